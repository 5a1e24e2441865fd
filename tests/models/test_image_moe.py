"""Image models: shapes, dropout and fresh params."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw, draw_params, make_image_model

from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.one_layer import apply_experts
from fedmoe_jax.models.routing import gate_logits

pytestmark = pytest.mark.slow

BATCH, EXPERTS, LABELS, FEATURES = 3, 5, 4, 6


# ---- models


ALLOWED = [
    ("mlp", "mlp", (8, 8, 1), (8,)),
    ("mlp", "mlp", (5, 7, 2), (8,)),
    ("flat", "mlp", (5, 7, 2), (70,)),
    ("flat", "dense", (5, 7, 2), (70,)),
    ("mlp", "dense", (8, 8, 1), (8,)),
    ("simple_cnn", "dense", (32, 32, 3), (14, 14, 16)),
    ("simple_cnn", "conv", (8, 8, 1), (2, 2, 16)),
    ("cnn", "dense", (8, 8, 1), (1, 1, 16)),
    ("resnet8", "dense", (8, 8, 1), (2, 2, 32)),
    ("cnn", "mlp", (8, 8, 1), (1, 1, 16)),
    ("cnn", "mlp", (32, 32, 3), (4, 4, 16)),
    ("cnn", "conv", (32, 32, 3), (4, 4, 16)),
    ("resnet8", "mlp", (16, 8, 1), (4, 2, 32)),
    ("resnet8", "conv", (8, 8, 1), (2, 2, 32)),
]


@pytest.mark.parametrize(("stem", "expert", "image_shape", "feature_shape"), ALLOWED)
def test_build_model_of_every_allowed_combination_has_its_shapes(
    stem, expert, image_shape, feature_shape
):
    model = make_image_model(stem, expert, image_shape)
    params, frozen = shape_params(model)
    assert set(params) == {"stem", "gate", "experts", "head"} and frozen == {}
    for leaf in jax.tree.leaves((params["gate"], params["experts"])):
        assert leaf.shape[0] == EXPERTS
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    parts, (experts,) = model.parts, params["experts"].values()
    batch = {"x": jax.ShapeDtypeStruct((BATCH, *image_shape), jnp.float32)}
    features = jax.eval_shape(parts.stem, params["stem"], batch, None)
    assert features.shape == (BATCH, *feature_shape)
    logits = jax.eval_shape(gate_logits, params["gate"]["moe"], features)
    assert logits.shape == (BATCH, EXPERTS)
    outputs = jax.eval_shape(
        lambda experts, x: apply_experts(parts, experts, x, None), experts, features
    )
    width = 8 if expert == "dense" else FEATURES
    assert outputs.shape == (BATCH, EXPERTS, width)
    predictions = jax.eval_shape(parts.head, params["head"], outputs)
    assert predictions.shape == (BATCH, EXPERTS, LABELS)


@pytest.mark.parametrize("stem", ["cnn", "simple_cnn", "resnet8"])
def test_build_model_allows_widths_that_are_no_multiple_of_a_group(stem):
    model = make_image_model(stem, "conv", (16, 16, 1), stem_width=28, expert_width=44)
    params, frozen = shape_params(model)
    assert params["experts"]["moe"]["Conv_0"]["kernel"].shape[-1] == 44


# ---- dropout


@pytest.fixture(scope="module")
def dropping():
    """Parts of a model that drops, of one that does not, params and images for both."""
    changes = {"stem_dropout": 0.25, "expert_dropout": 0.5, "expert_width": 256}
    model = make_image_model("flat", "dense", (16, 16, 1), **changes)
    whole = make_image_model("flat", "dense", (16, 16, 1), expert_width=256)
    images = {"x": jnp.abs(draw(64, 16, 16, 1)) + 0.1}
    return model.parts, whole.parts, draw_params(model), images


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_experts_and_stem_drop_their_rates(dropping, platform):
    parts, whole, params, images = dropping
    parts = parts._replace(platform=platform)
    key = jax.random.key(1)
    features = parts.stem(params["stem"], images, key)
    kept = np.asarray(features) != 0
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.02)
    before = whole.stem(params["stem"], images, None)
    np.testing.assert_allclose(
        np.asarray(features)[kept], np.asarray(before)[kept] / 0.75, rtol=1e-5
    )
    dropped = apply_experts(parts, params["experts"]["moe"], features, key)
    outputs = np.asarray(apply_experts(whole, params["experts"]["moe"], features, None))
    kept = (np.asarray(dropped) != 0)[outputs != 0]
    np.testing.assert_allclose(kept.mean(), 0.5, atol=0.02)
    # Every expert draws a mask of its own.
    masks = (np.asarray(dropped) != 0) | (outputs == 0)
    both = (outputs[:, 0] != 0) & (outputs[:, 1] != 0)
    np.testing.assert_allclose(
        (masks[:, 0] == masks[:, 1])[both].mean(), 0.5, atol=0.05
    )


def test_no_key_means_no_dropout(dropping):
    parts, whole, params, images = dropping
    features = parts.stem(params["stem"], images, None)
    np.testing.assert_array_equal(features, whole.stem(params["stem"], images, None))
    outputs = apply_experts(parts, params["experts"]["moe"], features, None)
    expected = apply_experts(
        whole, params["experts"]["moe"], features, jax.random.key(0)
    )
    np.testing.assert_array_equal(outputs, expected)


def test_apply_experts_draws_the_same_masks_on_any_platform(dropping):
    parts, _, params, images = dropping
    features, found = parts.stem(params["stem"], images, None), []
    for platform in ("cpu", "gpu"):
        there, key = parts._replace(platform=platform), jax.random.key(2)
        found.append(apply_experts(there, params["experts"]["moe"], features, key))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_build_model_of_equal_arguments_is_the_same():
    assert make_image_model() is make_image_model()
    assert make_image_model() is not make_image_model(num_experts=EXPERTS + 1)


def test_init_draws_every_expert_differently():
    def kernels(key):
        params, _ = make_image_model(num_experts=3).init(key)
        dense, gate = params["experts"]["moe"]["Dense_0"], params["gate"]["moe"]
        return dense["kernel"], gate["kernel"]

    for kernel in jax.jit(kernels)(jax.random.key(0)):
        assert len(np.unique(np.asarray(kernel).reshape(3, -1)[:, 0])) == 3
