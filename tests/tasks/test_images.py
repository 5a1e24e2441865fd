"""Images: normalised pixels, cross-entropy and accuracy by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_data

from fedmoe_jax.options import UserError
from fedmoe_jax.tasks.images import (
    IMAGES,
    measure_channels,
    measure_pixels,
    normalise,
    prepare,
    score_labels,
)


def test_normalise_by_hand():
    x = jnp.array([0, 51, 255, 102], jnp.uint8).reshape(1, 2, 1, 2)
    mean, std = jnp.array([[[0.5, 0.2]]] * 2), jnp.array([[[0.25, 0.1]]] * 2)
    out = normalise(x, mean, std)
    np.testing.assert_allclose(out.reshape(-1), [-2, 0, 2, 2], atol=1e-5)


def draw_data():
    x = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 2)).astype(np.uint8)
    x[..., 1] = 51  # a blank channel
    return make_data()._replace(train={"x": x, "y": np.arange(10, dtype=np.int32)})


def test_measure_channels_by_hand():
    data = draw_data()
    mean, std = measure_channels(data)
    pixels = data.train["x"] / 255.0
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, [pixels[..., 0].std(), 1e-3], rtol=1e-4)
    assert mean.dtype == std.dtype == np.float32


@pytest.mark.parametrize("wrong", [lambda x: x / 255.0, lambda x: x[..., 0]])
def test_measure_pixels_takes_images_of_bytes_alone(wrong):
    data = draw_data()
    odd = data._replace(train=data.train | {"x": wrong(data.train["x"])})
    with pytest.raises(
        UserError, match=r"train\['x'\] .* allowed: uint8\[X, H, W, F\]"
    ):
        measure_pixels(odd)


def test_prepare_gives_training_images_unit_variance():
    data = draw_data()
    statistics = measure_pixels(data)
    assert statistics["mean"].shape == statistics["std"].shape == (4, 6, 2)
    batch = prepare(data.train, statistics)
    np.testing.assert_allclose(batch["x"].mean((0, 1, 2)), [0, 0], atol=1e-4)
    np.testing.assert_allclose(batch["x"].std((0, 1, 2)), [1, 0], atol=1e-4)
    assert batch["y"] is data.train["y"] and batch["x"].dtype == jnp.float32


def test_score_labels_by_hand():
    odds = jnp.array([[1.0, 2.0, 5.0], [3.0, 6.0, 1.0]])
    scores = score_labels(jnp.log(odds), {"y": jnp.array([2, 0])})
    np.testing.assert_allclose(scores.loss, -np.log([5 / 8, 3 / 10]), rtol=1e-6)
    assert scores.score.tolist() == [1, 0] and scores.weight is None


def test_num_outputs_of_images_are_the_classes():
    assert IMAGES.num_outputs(make_data(7)) == 7
