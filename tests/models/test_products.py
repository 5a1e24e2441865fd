"""FLOPs of products by leaf: by hand, against XLA's, and those of narrower models."""

import jax
import jax.numpy as jnp
import pytest
from checkpoints import EXPERTS, LAYERS, V, save_checkpoint
from factories import make_image_model, shape_rows

from configs import default
from fedmoe_jax.base import Route
from fedmoe_jax.models import lora
from fedmoe_jax.models.flops import count_flops, shape_inputs, shape_params
from fedmoe_jax.models.products import count_fixed_products, count_products
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


def test_rows_that_are_looked_up_are_those_of_the_leaf():
    """As frozen experts are, by the ids of those that a client holds."""
    params = {"stack": f32(4, 5, 7)}

    def forward(params, held, rows):
        return rows @ jnp.take(params["stack"], held, axis=0)[0]

    held = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert count_products(forward, params, held, f32(3, 5)) == {"stack": 2.0 * 3 * 35}


# Nine tokens: attention of 4 heads, 2 of keys and values, of 4 each from 16 features;
# three matrices of a hidden layer of 24; and the head.
ATTENTION = LAYERS * 2 * 9 * 16 * (16 + 8 + 8 + 16)
HIDDEN = LAYERS * 2 * 9 * 16 * 24 * 3
HEAD = 2 * 9 * 16 * V
PAIRS = LAYERS * 2 * 9 * 3 * (16 + 16 + 24)  # of rank 3, the first of each alone


@pytest.mark.parametrize(
    ("family", "fixed", "expected"),
    [
        ("llama", False, (ATTENTION + HIDDEN + HEAD, 0)),
        ("llama", True, (ATTENTION + HIDDEN + HEAD, PAIRS)),
        ("mixtral", False, (ATTENTION + HEAD, HIDDEN)),
    ],
)
def test_fixed_products_of_a_base_by_hand(family, fixed, expected, tmp_path):
    """Experts on a dense base share its products; those of a mixture have their own."""
    save_checkpoint(tmp_path, family)
    config = default.get_config()
    fields = {"kind": "lora", "base": str(tmp_path), "lora_rank": 3}
    fields["lora_fixed"] = fixed
    config.update_from_flattened_dict(
        {f"model.{name}": value for name, value in fields.items()}
        | {"num_experts": EXPERTS}
    )
    row = {"tokens": jax.ShapeDtypeStruct((1, 9), jnp.int32)}
    model = lora.build(config, row, V, "cpu")
    assert count_fixed_products(model, shape_rows(row)) == expected


def test_models_of_their_own_keep_nothing_fixed():
    row = {"x": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)}
    assert count_fixed_products(make_image_model(), shape_rows(row)) == (0, 0)
