"""Image models: shapes, dropout and fresh params."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw, draw_params, make_image_model

from fedmoe_jax.base import Route
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.one_layer import apply_experts, run_shared
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
    ("lenet", "dense", (32, 32, 3), (160,)),
    ("lenet", "mlp", (16, 16, 1), (160,)),
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


# ---- a shared expert


@pytest.mark.parametrize("expert", ["mlp", "conv"])
def test_init_of_a_shared_expert_changes_nothing_else(expert):
    """The other parts start as without it; it has the form of a routed one."""
    build = lambda width: make_image_model(
        "cnn", expert, (16, 16, 1), shared_width=width
    )
    plain, with_shared = (jax.jit(build(n).init)(jax.random.key(5))[0] for n in (0, 8))
    shared = with_shared["stem"].pop("shared")
    jax.tree.map(np.testing.assert_array_equal, with_shared, plain)
    routed = plain["experts"]["moe"]
    assert jax.tree.map(lambda leaf: leaf[0].shape, routed) == jax.tree.map(
        lambda leaf: leaf.shape, shared
    )
    kernel = np.asarray(shared["Dense_0"]["kernel"])
    assert (
        (np.abs(np.asarray(routed["Dense_0"]["kernel"]) - kernel) > 1e-3)
        .any((1, 2))
        .all()
    )
    wide = shape_params(build(24))[0]["stem"]["shared"]
    assert wide["Dense_0"]["kernel"].shape[0] == 3 * kernel.shape[0]


def test_build_model_without_a_shared_expert_has_none():
    model = make_image_model()
    assert model.parts.shared is None and "shared" not in shape_params(model)[0]["stem"]


def test_a_shared_expert_drops_its_rate_by_a_mask_of_its_own():
    """With all experts alike and a bare head, what is dropped shows in the outputs."""
    changes = {"expert_dropout": 0.5, "shared_width": 64, "expert_width": 64}
    build = lambda **more: make_image_model(
        "flat", "mlp", (4, 4, 1), feature_width=2000, **changes | more
    )
    model, params = build(num_experts=2), draw_params(build(num_experts=2))
    key, features = jax.random.key(3), draw(2, 16)
    shared = run_shared(model.parts, params["stem"], features, key)
    routed = apply_experts(model.parts, params["experts"]["moe"], features, key)
    whole = run_shared(model.parts, params["stem"], features, None)
    kept = np.asarray(shared) != 0
    np.testing.assert_allclose(kept.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(
        np.asarray(shared)[kept], 2 * np.asarray(whole)[kept], rtol=1e-5
    )
    for mask in np.moveaxis(np.asarray(routed) != 0, 1, 0):
        np.testing.assert_allclose((mask == kept).mean(), 0.5, atol=0.03)
    # Routed experts drop what they drop without a shared one.
    plain = build(num_experts=2, shared_width=0).parts
    again = apply_experts(plain, params["experts"]["moe"], features, key)
    np.testing.assert_array_equal(routed, again)


@pytest.mark.parametrize("shared_width", [0, 64])
def test_apply_drops_only_with_a_key(shared_width):
    model = make_image_model(expert_dropout=0.5, shared_width=shared_width)
    whole = make_image_model(shared_width=shared_width)
    params, batch = draw_params(model), {"x": draw(BATCH, 8, 8, 1)}
    slots = jnp.arange(EXPERTS)[None], jnp.ones((1, EXPERTS), bool)
    answer = lambda model, key: model.apply(params, {}, batch, *slots, Route(2), key)[0]
    expected = answer(whole, None)
    np.testing.assert_array_equal(answer(model, None), expected)
    np.testing.assert_array_equal(answer(whole, jax.random.key(0)), expected)
    assert np.abs(answer(model, jax.random.key(0)) - expected).max() > 1e-2
