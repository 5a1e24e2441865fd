"""Batches are the chosen rows as the task prepares them, and their shapes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_data

from fedmoe_jax.base import Task
from fedmoe_jax.tasks.batches import shape_batch, take_batch
from fedmoe_jax.tasks.images import IMAGES, measure_pixels

TOY = Task(
    statistics=lambda data: None,
    prepare=lambda rows, shift: {"x": rows["x"] + shift, "odd": rows["x"] % 2 == 1},
    loss=lambda outputs, batch: None,
    num_outputs=lambda data: 1,
    drifts=(
        ("add", lambda rows, amount: {"x": rows["x"] + amount}),
        ("scale", lambda rows, amount: {"x": rows["x"] * amount}),
    ),
)
ROWS = {"x": np.float32([1.0, 2.0, 3.0, 4.0])}


def draw_data():
    x = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 2)).astype(np.uint8)
    return make_data()._replace(train={"x": x, "y": np.arange(10, dtype=np.int32)})


def test_take_batch_prepares_the_chosen_rows_by_hand():
    batch = take_batch(ROWS, np.array([3, 0, 0]), 10.0, TOY)
    assert batch["x"].tolist() == [14, 11, 11]
    assert batch["odd"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("drift", "expected"), [("add", [16, 13]), ("scale", [18, 12])]
)
def test_take_batch_drifts_rows_before_they_are_prepared(drift, expected):
    ids = np.array([3, 0])
    batch = take_batch(ROWS, ids, 10.0, TOY, drift, np.float32(2))
    assert batch["x"].tolist() == expected
    unread = take_batch(ROWS, ids, 10.0, TOY, drift)  # without an amount
    assert unread["x"].tolist() == [14, 11]


@pytest.mark.slow
@pytest.mark.parametrize("drift", [name for name, _ in IMAGES.drifts])
def test_take_batch_drifts_the_images_alone(drift):
    data = draw_data()
    taken = data.train, jnp.array([7, 2]), measure_pixels(data), IMAGES
    plain = take_batch(*taken)
    np.testing.assert_array_equal(plain["y"], [7, 2])
    drifted = take_batch(*taken, drift, jnp.float32(0.5))
    np.testing.assert_array_equal(drifted["y"], [7, 2])
    assert np.abs(drifted["x"] - plain["x"]).max() > 1e-3
    same = take_batch(*taken, drift, jnp.float32(0))
    np.testing.assert_allclose(same["x"], plain["x"], atol=1e-3)


def test_shape_batch_of_any_size():
    data = draw_data()
    shapes = shape_batch(data.train, measure_pixels(data), IMAGES)
    batch = shapes.of(5)
    assert batch["x"].shape == (5, 4, 6, 2) and batch["x"].dtype == jnp.float32
    assert batch["y"].shape == (5,) and batch["y"].dtype == jnp.int32
    assert hash(shapes) == hash(shape_batch(data.train, measure_pixels(data), IMAGES))


def test_shape_batch_is_the_shape_of_a_batch_that_is_taken():
    shapes = shape_batch(ROWS, 1.0, TOY)
    batch = take_batch(ROWS, np.array([2, 1]), 1.0, TOY)
    form = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(form, batch) == jax.tree.map(form, shapes.of(2))
    assert shape_batch({"x": np.zeros(9, np.float32)}, 1.0, TOY) == shapes
    assert shape_batch({"x": np.zeros((4, 1), np.float32)}, 1.0, TOY) != shapes
    assert shape_batch({"x": np.zeros(4, np.int32)}, 1, TOY) != shapes
