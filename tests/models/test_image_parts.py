"""The parts of image models by hand, and which of them fit each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw, draw_params, make_image_model

from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.image_parts import (
    LeNetStem,
    MlpExpert,
    MlpStem,
    check_fit,
    check_shared,
)
from fedmoe_jax.options import UserError

BATCH = 3


@pytest.mark.parametrize(
    ("stem", "expert", "image_shape", "field", "allowed"),
    [
        ("mlp", "conv", (8, 8, 1), "model.expert='conv'", "dense, mlp"),
        ("flat", "conv", (8, 8, 1), "model.expert='conv'", "dense, mlp"),
        ("cnn", "mlp", (12, 8, 1), "model.stem='cnn'", "flat, mlp"),
        ("simple_cnn", "mlp", (8, 12, 1), "model.stem='simple_cnn'", "flat, mlp"),
        ("resnet8", "mlp", (8, 10, 1), "model.stem='resnet8'", "flat, mlp"),
        ("lenet", "mlp", (16, 12, 1), "model.stem='lenet'", "flat, mlp"),
        ("lenet", "dense", (30, 32, 3), "model.stem='lenet'", "flat, mlp"),
        ("lenet", "conv", (32, 32, 3), "model.expert='conv'", "dense, mlp"),
        ("cnn", "conv", (8, 8, 1), "model.expert='conv'", "dense, mlp"),
        ("cnn", "conv", (24, 32, 3), "model.expert='conv'", "dense, mlp"),
    ],
)
def test_check_fit_refuses_parts_that_do_not_fit(
    stem, expert, image_shape, field, allowed
):
    with pytest.raises(UserError) as error:
        make_image_model(stem, expert, image_shape)
    message = str(error.value)
    assert field in message and message.endswith(f": {allowed}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("stem", "expert", "image_shape"),
    [
        ("flat", "mlp", (5, 7, 2)),
        ("mlp", "dense", (1, 9, 1)),
        ("simple_cnn", "conv", (8, 24, 3)),
        ("resnet8", "conv", (8, 8, 1)),
        ("lenet", "dense", (16, 28, 1)),
        ("cnn", "mlp", (8, 8, 1)),
        ("cnn", "conv", (16, 32, 3)),
    ],
)
def test_check_fit_allows_the_least_sides(stem, expert, image_shape):
    check_fit(stem, expert, image_shape)


def test_check_shared_refuses_outputs_that_are_hidden_units():
    with pytest.raises(UserError) as error:
        make_image_model("flat", "dense", (8, 8, 1), shared_width=8)
    assert str(error.value) == (
        "model.shared_width=8 is not allowed with model.expert='dense', whose outputs "
        "are its hidden units, so that other widths cannot be added; allowed: 0"
    )
    check_shared("dense", 0)
    check_shared("conv", 8)


def test_mlp_stem_normalises_features_by_hand():
    x = np.float32([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]).reshape(2, 1, 3, 1)
    kernel = np.float32([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    norm = {"scale": np.float32([1.0, 3.0]), "bias": np.float32([0.5, 0.0])}
    params = {
        "Dense_0": {"kernel": kernel, "bias": np.float32([0.0, 1.0])},
        "LayerNorm_0": norm,
    }
    # Hidden units 1, 5 and -3, 3, so after the relu 1, 5 and 0, 3.
    out = jax.jit(MlpStem(2, "cpu").apply)({"params": params}, x)
    np.testing.assert_allclose(out, [[-0.5, 3.0], [-0.5, 3.0]], atol=1e-4)


def test_mlp_expert_has_one_hidden_layer_by_hand():
    x = np.float32([[1.0, -2.0], [0.0, 1.0]]).reshape(2, 1, 2, 1)
    kernel = np.float32([[1.0, -1.0], [2.0, 1.0]])
    first = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
    second = {"kernel": np.float32([[1.0], [10.0]]), "bias": np.float32([-5.0])}
    params = {"Dense_1": first, "Dense_0": second}  # named from the outside in
    # Hidden units -3, -3 and 2, 1; the outputs have no relu.
    out = jax.jit(MlpExpert(2, 1, "cpu").apply)({"params": params}, x)
    assert out.tolist() == [[-5.0], [7.0]]


@pytest.mark.slow
def test_simple_cnn_stem_has_the_params_of_the_benchmark():
    """Without the gate: McMahan's CIFAR-10 network of two convolutions."""
    model = make_image_model(
        "simple_cnn",
        "dense",
        (32, 32, 3),
        stem_width=32,
        expert_width=128,
        num_experts=1,
        num_classes=10,
    )
    params, frozen = shape_params(model)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(params["stem"]) == 9 * 3 * 32 + 32 + 9 * 32 * 64 + 64
    assert count(params["experts"]) == 14 * 14 * 64 * 128 + 128
    assert count(params["head"]) == 128 * 10 + 10
    assert count(params["gate"]) == 64 + 1
    assert count(params) == 1_626_442 + 65


@pytest.mark.slow
def test_lenet_stem_has_the_params_of_the_benchmark():
    """NIID-Bench's simple-cnn, 62,006 without the gate, which one expert needs not."""
    shape = {"stem_width": 6, "expert_width": 84, "num_experts": 1, "num_classes": 10}
    model = make_image_model("lenet", "dense", (32, 32, 3), **shape)
    params, _ = shape_params(model)
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(params[part]))
    assert count("stem") == 6 * 76 + 16 * (6 * 25 + 1) + 400 * 120 + 120
    assert count("experts") == 120 * 84 + 84 and count("head") == 84 * 10 + 10
    assert sum(map(count, ("stem", "experts", "head"))) == 62_006


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_lenet_stem_is_that_of_plain_convolutions(platform):
    stem = LeNetStem(3, platform)
    x = draw(BATCH, 16, 20, 2)
    params = stem.init(jax.random.key(0), x)["params"]
    y = x
    for name in ("Conv_0", "Conv_1"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        assert kernel.shape[:2] == (5, 5)
        y = jax.lax.conv_general_dilated(
            y, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = np.maximum(np.asarray(y) + np.asarray(bias), 0)
        y = y.reshape(BATCH, y.shape[1] // 2, 2, y.shape[2] // 2, 2, -1).max((2, 4))
    dense = jax.tree.map(np.asarray, params["Dense_0"])
    y = np.maximum(y.reshape(BATCH, -1) @ dense["kernel"] + dense["bias"], 0)
    np.testing.assert_allclose(stem.apply({"params": params}, x), y, atol=1e-5)


@pytest.mark.slow
def test_lenet_stem_has_the_gradients_of_plain_convolutions():
    """On a CPU the kernel's and the images' are spelt as forward convolutions."""
    x = draw(BATCH, 16, 20, 2)
    params = LeNetStem(3, "cpu").init(jax.random.key(0), x)["params"]

    def loss(params, x, platform):
        return jnp.sin(LeNetStem(3, platform).apply({"params": params}, x)).sum()

    found, known = (jax.grad(loss, (0, 1))(params, x, p) for p in ("cpu", "gpu"))
    for one, other in zip(*map(jax.tree.leaves, (found, known)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_flat_stem_and_dense_expert_by_hand():
    model = make_image_model("flat", "dense", (2, 3, 2), expert_width=4, num_experts=1)
    images = draw(BATCH, 2, 3, 2)
    features = model.parts.stem({}, {"x": images}, None)
    np.testing.assert_array_equal(features, images.reshape(BATCH, 12))
    params = draw_params(model)
    assert params["stem"] == {}
    row = jax.tree.map(lambda leaf: leaf[0], params["experts"]["moe"])
    linear = (
        np.asarray(features @ row["Dense_0"]["kernel"]) + row["Dense_0"]["bias"][None]
    )
    out = model.parts.expert(row, features, None)
    np.testing.assert_allclose(out, np.maximum(linear, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_resnet8_stem_subsamples_in_its_shortcuts():
    """With zero branches a block is relu(Dense(x[::2, ::2]))."""
    model = make_image_model("resnet8", "mlp", (8, 8, 1), stem_width=2)
    params = draw_params(model)["stem"]
    for block in range(3):
        norm = params[f"norm{block}b"]
        params[f"norm{block}b"] = jax.tree.map(jnp.zeros_like, norm)
    x = draw(BATCH, 8, 8, 1)
    out = model.parts.stem(params, {"x": x}, None)
    first = jax.lax.conv_general_dilated(
        x,
        params["Conv_0"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    flat = np.asarray(first).reshape(BATCH, -1)
    normed = (flat - flat.mean(1)[:, None]) / flat.std(1)[:, None]
    normed = normed.reshape(BATCH, 8, 8, 2)
    scale, bias = (np.asarray(params["norm"][name]) for name in ("scale", "bias"))
    y = np.maximum(normed * scale + bias, 0)
    for block in (1, 2):
        kernel = np.asarray(params[f"shortcut{block}"]["kernel"])
        y = np.maximum(y[:, ::2, ::2] @ kernel, 0)
    np.testing.assert_allclose(out, y, rtol=1e-3, atol=1e-4)
