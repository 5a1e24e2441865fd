"""Distortions of images: against slow twins and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from fedmoe_jax.tasks.distortion import DISTORTIONS, distort

pytestmark = pytest.mark.slow

change = jax.jit(distort, static_argnames="kind")


def images(shape=(3, 8, 8, 2)):
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.float32)


# --- sources and schedule


@pytest.mark.parametrize("kind", DISTORTIONS)
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 5, 6, 3), (2, 2, 1, 3)])
def test_distort_by_zero_changes_no_bit(kind, shape):
    x = images(shape)
    same = change(x, kind, 0.0)
    assert same.dtype == jnp.float32
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_distort_keeps_images_in_their_range(kind):
    x = images((4, 6, 9, 3))
    for amount in (0.3, 0.9):
        new = np.asarray(change(x, kind, amount))
        assert new.shape == x.shape and not np.allclose(new, x, atol=1)
        assert new.min() >= -1e-3 and new.max() <= 255 + 1e-3


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [4, 7])
def test_rotate_by_quarter_turns_is_counterclockwise(turns, side):
    x = images((2, side, side, 3))
    turned = change(x, "rotate", 90.0 * turns)
    expected = np.rot90(x, turns, axes=(1, 2))  # counterclockwise as well
    np.testing.assert_allclose(turned, expected, atol=0.02)


@pytest.mark.parametrize("degrees", [10.0, -33.0, 77.0])
def test_rotate_matches_a_slow_one(degrees):
    x = images((1, 6, 9, 1))[0, :, :, 0]
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.array([[cos, sin], [-sin, cos]])  # of a target to its source
    middle = (np.array(x.shape) - 1) / 2
    offset = middle - matrix @ middle
    slow = scipy.ndimage.affine_transform(
        x, matrix, offset, order=1, mode="nearest", output=np.float64
    )
    fast = change(x[None, :, :, None], "rotate", degrees)[0, :, :, 0]
    np.testing.assert_allclose(fast, slow, atol=0.01)


@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.5])
def test_blur_matches_scipy(deviation):
    x = images((2, 6, 9, 2))
    slow = scipy.ndimage.gaussian_filter(
        x.astype(np.float64), deviation, mode="nearest", radius=3, axes=(1, 2)
    )
    np.testing.assert_allclose(change(x, "blur", deviation), slow, atol=1e-3)


def test_blur_keeps_constant_images():
    x = np.full((1, 5, 5, 2), 77, np.float32)
    np.testing.assert_allclose(change(x, "blur", 1.3), x, rtol=1e-6)


def test_reduce_contrast_by_hand():
    x = np.array([[0.0, 200.0], [40.0, 80.0], [100.0, 100.0]], np.float32)
    x = x[:, None, :, None]  # three images of two pixels: means 100, 60, 100
    half = np.asarray(change(x, "contrast", 0.5))[:, 0, :, 0]
    assert half.tolist() == [[50.0, 150.0], [50.0, 70.0], [100.0, 100.0]]
    none = np.asarray(change(x, "contrast", 1.0))[:, 0, :, 0]
    assert none.tolist() == [[100.0, 100.0], [60.0, 60.0], [100.0, 100.0]]


def test_reduce_contrast_keeps_the_mean_of_each_channel():
    x = np.array([10.0, 200.0, 30.0, 100.0], np.float32).reshape(1, 1, 2, 2)
    grey = np.asarray(change(x, "contrast", 1.0))
    assert grey.ravel().tolist() == [20.0, 150.0, 20.0, 150.0]


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_distort_by_an_amount_of_each_client(kind):
    x = images((3, 2, 5, 5, 1))
    amounts = jnp.array([0.0, 0.5, 1.0])
    many = jax.jit(jax.vmap(functools.partial(distort, kind=kind)))(x, amount=amounts)
    for client, amount in enumerate(amounts):
        one = change(x[client], kind, amount)
        np.testing.assert_allclose(many[client], one, atol=1e-3)


# --- the processes
