"""Covariate drift of images: they rotate, blur or lose contrast."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.types import Array

BLUR_RADIUS = 3  # pixels


def rotate(x: Array, amount: Array) -> Array:
    """Rotates images about their centre, counterclockwise as one looks at them.

    Bilinear, with the edge repeated outwards.

    Args:
      x: [B, H, W, F] float32.
      amount: [] float32 degrees.
    """
    height, width = x.shape[1:3]
    places, weights = _find_corners(height, width, amount)

    def turn(image: Array) -> Array:
        pixels = image.reshape(height * width, -1)
        total = jnp.zeros_like(pixels)
        for place, weight in zip(places, weights, strict=True):
            corner = pixels.at[place].get(mode="promise_in_bounds")
            total += weight[:, None] * corner
        return total.reshape(image.shape)

    # Outside of a loop XLA finds the corners anew for every image and colour, wherever
    # the images are used, which is cheaper than a loop only where they are small.
    if height * width <= 256:
        return jax.vmap(turn)(x)
    return jax.lax.map(turn, x, batch_size=8)


def _find_corners(height: int, width: int, amount: Array) -> tuple[Array, Array]:
    """Four source pixels of each target, [4, H * W] int32, and their weights."""
    angle = jnp.deg2rad(amount)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(np.float32)
    y, x = y - middle_y, x - middle_x
    row, row_weight = _split_place(middle_y + cos * y + sin * x, height)
    column, column_weight = _split_place(middle_x + cos * x - sin * y, width)
    place = row[:, None] * width + column[None]
    weight = row_weight[:, None] * column_weight[None]
    return place.reshape(4, -1), weight.reshape(4, -1)


def _split_place(place: Array, size: int) -> tuple[Array, Array]:
    """The whole numbers in [0, size) on both sides of places [P], and their weights.

    Both are [2, P].
    """
    place = jnp.clip(place, 0, size - 1)
    low = place.astype(jnp.int32)
    share = place - low
    sides = jnp.stack([low, jnp.minimum(low + 1, size - 1)])
    return sides, jnp.stack([1 - share, share])


def blur(x: Array, amount: Array) -> Array:
    """Gaussian blur within 3 pixels, with the edge repeated outwards.

    Args:
      x: [B, H, W, F] float32.
      amount: [] float32 >= 0, standard deviation in pixels.
    """
    # As products of matrices it takes half the time of sums of shifted images. Lower
    # precision, the default on accelerators, would change images at an amount of 0.
    exact = jax.lax.Precision.HIGHEST
    rows, columns = (_blur_matrix(size, amount) for size in x.shape[1:3])
    x = jnp.einsum("gh,bhwf->bgwf", rows, x, precision=exact)
    return jnp.einsum("vw,bhwf->bhvf", columns, x, precision=exact)


def _blur_matrix(size: int, amount: Array) -> Array:
    """The weight of each pixel of a line in each blurred one, rows sum to 1."""
    offset = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    # The bound makes the kernel of a deviation of 0 exactly 0 beside its middle.
    density = jnp.exp(-0.5 * (offset / jnp.maximum(amount, 1e-6)) ** 2)
    weight = density / density.sum()
    place = np.clip(np.arange(size)[:, None] + offset, 0, size - 1)
    hit = place[:, :, None] == np.arange(size)
    return jnp.where(hit, weight[:, None], 0.0).sum(axis=1)


def reduce_contrast(x: Array, amount: Array) -> Array:
    """Takes contrast away: every pixel moves towards its image's mean per channel.

    As in ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261).

    Args:
      x: [B, H, W, F] float32.
      amount: [] float32 in [0, 1], share of the contrast that is lost.
    """
    return x + amount * (x.mean(axis=(1, 2), keepdims=True) - x)


# (images [B, H, W, F], amount []) -> images; an amount of 0 changes no bit.
DISTORTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "rotate": rotate,
    "blur": blur,
    "contrast": reduce_contrast,
}


def distort(x: Array, kind: str, amount: Array) -> Array:
    """Covariate drift: distorts images.

    Args:
      x: [B, H, W, F] float32 in [0, 255].
      kind: a name of `DISTORTIONS`.
      amount: [] float32 >= 0, in the unit of the kind; 0 changes no bit.

    Returns:
      [B, H, W, F] float32, in [0, 255] up to rounding.
    """
    chex.assert_rank(x, 4)
    chex.assert_rank(amount, 0)
    return DISTORTIONS[kind](x, amount)
