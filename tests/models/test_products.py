"""FLOPs of products by leaf: by hand, against XLA's, and those of narrower models."""

import jax
import jax.numpy as jnp
import pytest

from configs import default
from fedmoe_jax.base import Route
from fedmoe_jax.models.flops import count_flops, shape_inputs, shape_params
from fedmoe_jax.models.products import count_products
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.train.plan import plan_run

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_of_dense_layers_by_hand():
    """Casts and other forms of a leaf stay the leaf; sums and activations do not."""
    params = {"a": f32(5, 7), "b": f32(3, 7), "bias": f32(7), "idle": f32(2)}

    def forward(params, rows):
        hidden = rows @ params["a"].astype(jnp.bfloat16).astype(jnp.float32)
        hidden = jax.nn.relu(hidden + params["bias"][None])
        mixed = hidden @ (hidden.T @ hidden)  # activations alone
        return jax.jit(jnp.matmul)(mixed, params["b"].T)

    found = count_products(forward, params, f32(4, 5))
    expected = {"a": 2 * 4 * 5 * 7, "b": 2 * 4 * 7 * 3, "bias": 0, "idle": 0}
    assert found == expected


def test_products_in_a_scan_count_as_often_as_it_runs():
    params = {"a": f32(6, 6), "b": f32(6, 6)}

    def forward(params, rows):
        stack = jnp.stack([params["a"], params["b"]])
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), rows, stack)[0]

    assert count_products(forward, params, f32(3, 6)) == {"a": 216.0, "b": 216.0}


@pytest.mark.parametrize(
    ("padding", "strides", "dilation", "groups"),
    [
        ("SAME", (1, 1), (1, 1), 1),
        ("SAME", (2, 2), (1, 1), 1),
        ("VALID", (1, 2), (1, 1), 1),
        ("SAME", (1, 1), (2, 1), 1),
        ("SAME", (1, 1), (1, 1), 2),
    ],
)
def test_convolutions_count_as_xla_counts_them(padding, strides, dilation, groups):
    kernel, images = f32(3, 3, 4 // groups, 6), f32(2, 9, 8, 4)

    def forward(kernel, images):
        return jax.lax.conv_general_dilated(
            *(images, kernel, strides, padding),
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    found = count_products(forward, kernel, images)
    assert found == count_flops(forward, kernel, images) > 0


def make_model(**changes):
    config = default.get_config("smoke")
    config.num_clients = config.cohort_size = 4
    config.update_from_flattened_dict(changes)
    program = plan_run(config, build_mesh(1)).program
    return program.model, program.batch


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["mlp", "cnn", "simple_cnn", "resnet8"])
def test_products_are_most_of_what_a_stem_computes(stem):
    model, batch = make_model(**{"model.stem": stem, "model.stem_width": 16})
    params, example = shape_params(model)[0]["stem"], batch.of(1)
    found = count_products(model.parts.stem, params, example, None)
    kernels = jax.tree_util.tree_leaves_with_path(found)
    assert all(value for path, value in kernels if "kernel" in str(path))
    whole = count_flops(model.parts.stem, params, example, None)
    assert 0.8 * whole < sum(jax.tree.leaves(found)) <= whole


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_products_of_a_transformer_by_hand(scan):
    changes = {
        **{"data.name": "markov", "data.length": 32, "partition.kind": "natural"},
        **{"model.kind": "transformer", "model.stem_width": 24, "model.heads": 2},
        **{"model.kv_heads": 2, "model.blocks": 4, "model.moe_every": 2},
        **{"model.dense_width": 16, "model.expert_width": 20, "model.shared_width": 4},
        "model.scan": scan,
    }
    model, batch = make_model(**changes)
    forward = lambda *inputs: model.apply(*inputs, Route(1), None)[0]
    found = count_products(forward, *shape_inputs(model, batch.of(1), 1))
    leaf = lambda width: 2.0 * 32 * 24 * width
    hidden = lambda width: dict.fromkeys(("gate", "up", "down"), leaf(width))
    for block, width in enumerate((16, 4, 16, 4)):
        own = found["stem"][f"block00{block}"]
        assert own["shared"] == hidden(width)
        assert set(own["attention"].values()) == {leaf(24)}
    experts = found["experts"]
    assert experts == {"block001": hidden(20), "block003": hidden(20)}
