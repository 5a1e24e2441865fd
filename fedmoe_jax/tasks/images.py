"""Images with one label each: pixels as a client sees them, normalised."""

import jax.numpy as jnp

from fedmoe_jax.types import Array
from fedmoe_jax.world.drift import distort


def normalise(x: Array, mean: Array, std: Array) -> Array:
    """Images [B, H, W, F] -> float32 with zero mean and unit variance per F.

    Pixels are uint8, or floats in [0, 255].
    `mean` and `std` [H, W, F] are read like the images, so that the loop vectorises.
    """
    return (x.astype(jnp.float32) / 255.0 - mean[None]) / std[None]


def see(x: Array, distortion: Array | None, kind: str) -> Array:
    """Images [B, H, W, F] as a client sees them: distorted where images drift."""
    if distortion is None:
        return x
    return distort(x.astype(jnp.float32), kind, distortion)
