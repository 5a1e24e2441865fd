"""Augmentation: the images that a client trains on are changed at random every time."""

import jax
import jax.numpy as jnp

from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array

SHIFT = 4  # pixels, of images of 32 x 32 as everywhere in the literature


def reflect(place: Array, size: int) -> Array:
    """Places in (-size, 2 * size - 1) mirrored at the first and the last of [0, size).

    The edge itself is not repeated, as with `jnp.pad(mode="reflect")`.
    """
    last = size - 1
    return last - jnp.abs(last - jnp.abs(place))


def crop_and_flip(x: Array, key: Array) -> Array:
    """Shifts every image by up to 4 pixels each way and mirrors half of them.

    The same as padding by 4 reflected pixels, a random crop and a random horizontal
    flip, which is how NIID-Bench (arXiv 2102.02079) and others train on CIFAR-10.

    Args:
      x: [B, H, W, F], any dtype; H and W beyond 4.
      key: consumed.

    Raises:
      UserError: the images are smaller.
    """
    count, height, width = x.shape[:3]
    if min(height, width) <= SHIFT:
        raise UserError(
            f"client.augment='crop_and_flip' needs images whose sides are {SHIFT + 1} "
            f"pixels at least, this data has {height}x{width}; allowed: none"
        )
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (2, count, 1), -SHIFT, SHIFT + 1)
    flip = jax.random.bernoulli(flip_key, shape=(count, 1))
    along = jnp.arange(width)[None]
    rows = reflect(jnp.arange(height)[None] + shift[0], height)
    columns = reflect(jnp.where(flip, width - 1 - along, along) + shift[1], width)
    image = jnp.arange(count)[:, None, None]
    return x[image, rows[:, :, None], columns[:, None]]
