"""Layers that stay fast inside compiled loops: convolution, pooling, normalisation.

XLA's CPU backend runs a convolution fast only in its canonical layout. The rewriting
pass that would bring the two gradient convolutions there does not visit loop bodies, so
inside `scan` they fall to a naive kernel, up to 80 times slower (jax-ml/jax issue
12868). `canonical_conv` therefore spells both gradients as forward convolutions.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from fedmoe_jax.types import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def native_conv(x: Array, kernel: Array) -> Array:
    """Stride-1 convolution that keeps height and width, as XLA provides it.

    Args:
      x: [B, H, W, I] float.
      kernel: [h, w, I, O] float, h and w odd.

    Returns:
      [B, H, W, O].
    """
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT
    )


@jax.custom_vjp
def canonical_conv(x: Array, kernel: Array) -> Array:
    """`native_conv` whose gradients are forward convolutions in canonical layout."""
    return native_conv(x, kernel)


def _canonical_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return native_conv(x, kernel), (x, kernel)


def _canonical_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    height, width = kernel.shape[:2]
    # The barriers keep XLA from folding the transposes into the convolution's layout.
    flipped = lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))
    grad_x = native_conv(grad, flipped)
    images = lax.optimization_barrier(x.transpose(3, 1, 2, 0))  # [I, H, W, B]
    window = lax.optimization_barrier(grad.transpose(1, 2, 0, 3))  # [H, W, B, O]
    padding = ((height // 2, height // 2), (width // 2, width // 2))
    grad_kernel = lax.optimization_barrier(
        lax.conv_general_dilated(
            images, window, (1, 1), padding, dimension_numbers=_LAYOUT
        )
    )  # [I, h, w, O]
    return grad_x, grad_kernel.transpose(1, 2, 0, 3)


canonical_conv.defvjp(_canonical_forward, _canonical_backward)


def conv(x: Array, kernel: Array) -> Array:
    """The convolution that is fast on this backend; arguments of `native_conv`."""
    on_cpu = jax.default_backend() == "cpu"
    return canonical_conv(x, kernel) if on_cpu else native_conv(x, kernel)


class Conv(nn.Module):
    """A 3x3 stride-1 convolution without bias: [B, H, W, I] -> [B, H, W, features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return conv(x, kernel)


def space_to_depth(x: Array) -> Array:
    """Moves 2x2 blocks into channels: [B, H, W, F] -> [B, H/2, W/2, 4F]."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // 2, width // 2, 4 * channels)


def max_pool(x: Array) -> Array:
    """2x2 max pooling: [B, H, W, F] -> [B, H/2, W/2, F]."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.max(blocks, axis=(2, 4))


def group_norm(x: Array, name: str) -> Array:
    """GroupNorm with equal groups of about 8 channels; call it in a compact module."""
    groups = max(1, x.shape[-1] // 8)
    while x.shape[-1] % groups:  # 28 channels are two groups, not three
        groups -= 1
    return nn.GroupNorm(num_groups=groups, name=name)(x)
