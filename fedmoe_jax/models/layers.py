"""Layers that stay fast inside compiled loops: convolution, pooling, dense layers.

On accelerators clients and experts are vmapped, and convolutions are products there.
XLA's CPU backend runs a convolution fast only in its canonical layout. The rewriting
pass that would bring the two gradient convolutions there does not visit loop bodies, so
inside `scan` they fall to a naive kernel, up to 80 times slower (jax-ml/jax issue
12868). `canonical_conv` therefore spells both gradients as forward convolutions.

The platform `ANY` is the plain form of every layer, whose FLOPs are counted: those of a
simulated device are the same wherever the simulation runs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from fedmoe_jax.types import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")
NORM_EPSILON = 1e-6  # Flax's
ANY = "any"


def native_conv(
    x: Array, kernel: Array, padding: tuple[int, int], stride: int
) -> Array:
    """Convolution as XLA provides it.

    Args:
      x: [B, H, W, I] float.
      kernel: [h, w, I, O] float.
      padding: zeros before and after, of height and width alike; below 0 it crops.
      stride: of height and width alike.

    Returns:
      [B, H', W', O] with H' = (H + sum(padding) - h) // stride + 1.
    """
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 2, (padding,) * 2, dimension_numbers=_LAYOUT
    )


def _stable_conv(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """`native_conv` of stride 1 that XLA leaves in its layout.

    XLA swaps images and kernel where the kernel is the larger, unless the zeros are
    part of the images.
    """
    if math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3]):
        inside = (*padding, 0)
        padded = lax.pad(
            x, jnp.zeros((), x.dtype), [(0, 0, 0), inside, inside, (0, 0, 0)]
        )
        x, padding = lax.optimization_barrier(padded), (0, 0)
    return native_conv(x, kernel, padding, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def canonical_conv(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """`native_conv` of stride 1, the gradients forward convolutions like itself.

    The kernel must be square.
    """
    return _stable_conv(x, kernel, padding)


def _canonical_forward(
    x: Array, kernel: Array, padding: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _stable_conv(x, kernel, padding), (x, kernel)


def _canonical_backward(
    padding: tuple[int, int], saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    # The barriers keep XLA from folding the transposes into the convolution's layout.
    flipped = lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))
    low, high = (kernel.shape[0] - 1 - zeros for zeros in padding)
    grad_x = _stable_conv(grad, flipped, (low, high))
    images = lax.optimization_barrier(x.transpose(3, 1, 2, 0))  # [I, H, W, B]
    window = lax.optimization_barrier(grad.transpose(1, 2, 0, 3))  # [H, W, B, O]
    grad_kernel = lax.optimization_barrier(_stable_conv(images, window, padding))
    return grad_x, grad_kernel.transpose(1, 2, 0, 3)  # [I, h, w, O] -> [h, w, I, O]


canonical_conv.defvjp(_canonical_forward, _canonical_backward)


def space_to_depth(x: Array) -> Array:
    """Moves 2x2 blocks into channels: [B, H, W, F] -> [B, H/2, W/2, 4F]."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // 2, width // 2, 4 * channels)


def _block_kernel(kernel: Array, row: int, column: int) -> Array:
    """A kernel for 2x2 blocks that starts at one pixel of a block.

    Args:
      kernel: [h, h, I, O], h odd.
      row: 0 or 1, the pixel's row in its block.
      column: 0 or 1, its column.

    Returns:
      [(h + 1) / 2, (h + 1) / 2, 4 I, O], which meets the same pixels.
    """
    size, _, inputs, outputs = kernel.shape
    sides = (row, 1 - row), (column, 1 - column), (0, 0), (0, 0)
    count = (size + 1) // 2
    even = jnp.pad(kernel, sides).reshape(count, 2, count, 2, inputs, outputs)
    return even.transpose(0, 2, 1, 3, 4, 5).reshape(count, count, 4 * inputs, outputs)


def strided_conv(x: Array, kernel: Array) -> Array:
    """`native_conv` of padding (0, 1) and stride 2, on 2x2 blocks with stride 1.

    That is XLA's SAME for even sides: [B, H, W, I] with a kernel [3, 3, I, O] gives
    [B, H/2, W/2, O].
    """
    return canonical_conv(space_to_depth(x), _block_kernel(kernel, 0, 0), (0, 1))


def block_conv(x: Array, kernel: Array) -> Array:
    """`native_conv` without padding, on 2x2 blocks: four times the channels.

    Where channels are few it is up to twice as fast on a CPU, although a larger kernel
    with zeros makes (1 + 1 / h) ** 2 times the FLOPs.

    Args:
      x: [B, H, W, I] float, H and W even.
      kernel: [h, h, I, O] float, h odd.

    Returns:
      [B, (H - h + 1) / 2, (W - h + 1) / 2, 4, O], the pixels of each 2x2 block.
    """
    places = [(row, column) for row in (0, 1) for column in (0, 1)]
    kernels = jnp.concatenate([_block_kernel(kernel, *p) for p in places], axis=-1)
    y: Array = canonical_conv(space_to_depth(x), kernels, (0, 0))
    return y.reshape(*y.shape[:3], 4, kernel.shape[3])


# Zeros before and after that a kernel needs, 3x3 but for VALID, on even sides, by
# padding and stride.
_SIDES = {("SAME", 1): (1, 1), ("SAME", 2): (0, 1), ("VALID", 1): (0, 0)}


def product_conv(
    x: Array, kernel: Array, padding: tuple[int, int], stride: int
) -> Array:
    """`native_conv` as one product of the images' patches; no padding is below 0.

    Vmapped over clients or experts with kernels of their own it is a batched product;
    a convolution would be a grouped one, with a group for each of them.
    """
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width, inputs, outputs = kernel.shape
    rows, columns = (
        (padded.shape[axis] - size) // stride * stride + 1
        for axis, size in ((1, height), (2, width))
    )
    patches = jnp.concatenate(
        [
            padded[:, i : i + rows : stride, j : j + columns : stride]
            for i in range(height)
            for j in range(width)
        ],
        axis=-1,
    )  # [B, H', W', h w I]
    return patches @ kernel.reshape(height * width * inputs, outputs)


def conv(x: Array, kernel: Array, padding: str, stride: int, platform: str) -> Array:
    """A convolution in the form that is fast on a platform.

    Args:
      x: [B, H, W, I] float; H and W even where the stride is 2.
      kernel: [h, h, I, O] float; 3x3 but for `VALID`.
      padding: `SAME` gives [B, H / stride, W / stride, O], `VALID` (stride 1 only)
        [B, H - h + 1, W - h + 1, O].
      stride: 1 or 2.
      platform: `cpu`, `gpu`, `tpu` or `ANY`.
    """
    sides = _SIDES[padding, stride]
    if platform == ANY:
        return native_conv(x, kernel, sides, stride)
    if platform != "cpu":
        return product_conv(x, kernel, sides, stride)
    return strided_conv(x, kernel) if stride == 2 else canonical_conv(x, kernel, sides)


class Conv(nn.Module):
    """A 3x3 convolution: [B, H, W, I] -> [B, H', W', features], see `conv`."""

    features: int
    platform: str
    padding: str = "SAME"
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        x = conv(x, kernel, self.padding, self.stride, self.platform)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            x = x + bias[None, None, None]
        return x


@jax.custom_vjp
def canonical_product(x: Array, kernel: Array) -> Array:
    """`x @ kernel`; [B, I] and [I, O] give [B, O].

    XLA's CPU backend forms the kernel's gradient, a product over the short batch, up to
    twice as fast where the images are transposed first.
    """
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Without the barrier XLA would fold the transpose into the product again.
    return grad @ kernel.T, lax.optimization_barrier(x.T) @ grad


canonical_product.defvjp(_product_forward, _product_backward)


class Dense(nn.Module):
    """An affine map with the parameters of `nn.Dense`: [B, I] -> [B, features].

    On the platform `cpu` its gradient is `canonical_product`'s.
    """

    features: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        product = canonical_product if self.platform == "cpu" else jnp.matmul
        return product(x, kernel) + bias[None]


def _blocks(x: Array) -> Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def maximum(x: Array, axes: tuple[int, ...]) -> Array:
    """`jnp.max`, whose gradient takes two passes, not five.

    Equal maxima share the gradient, as by default.
    """
    return jnp.max(x, axes)


def _maximum_forward(
    x: Array, axes: tuple[int, ...]
) -> tuple[Array, tuple[Array, Array]]:
    largest = jnp.max(x, axes)
    return largest, (x, largest)


def _maximum_backward(
    axes: tuple[int, ...], saved: tuple[Array, Array], grad: Array
) -> tuple[Array]:
    x, largest = saved
    equal = x == jnp.expand_dims(largest, axes)
    # Without XLA's optimisation x may be computed anew for the sum, rounded otherwise,
    # and equal no maximum: a gradient divided by 0 would be infinite.
    share = grad / jnp.maximum(equal.sum(axes, dtype=grad.dtype), 1)
    return (jnp.where(equal, jnp.expand_dims(share, axes), 0.0),)


maximum.defvjp(_maximum_forward, _maximum_backward)


def max_pool(x: Array) -> Array:
    """2x2 max pooling: [B, H, W, F] -> [B, H/2, W/2, F]."""
    return maximum(_blocks(x), (2, 4))


class PooledConv(nn.Module):
    """A convolution without padding, ReLU and 2x2 max pooling, with bias.

    [B, H, W, I] -> [B, (H - size + 1) / 2, (W - size + 1) / 2, features], where H and W
    are even and `size` is odd. On the platform `cpu` it is `block_conv`.
    """

    features: int
    platform: str
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.platform == "cpu":
            blocks, axes = block_conv(x, kernel), (3,)
        else:
            blocks = _blocks(conv(x, kernel, "VALID", 1, self.platform))
            axes = (2, 4)
        largest: Array = maximum(blocks, axes)
        return nn.relu(largest + bias[None, None, None])


def _spread(values: Array, channels: int) -> Array:
    """[B, groups] -> [B, channels], each group's value at all of its channels."""
    return jnp.repeat(values, channels // values.shape[1], axis=1)


def _group_sums(values: Array, groups: int) -> Array:
    """[B, channels] -> [B, groups]."""
    return values.reshape(values.shape[0], groups, -1).sum(-1)


def _measure_groups(x: Array, groups: int) -> tuple[Array, Array]:
    """Mean and inverse deviation of each image's groups, [B, F] each."""
    count, channels = x[0].size // groups, x.shape[-1]
    x = x.astype(jnp.float32)
    mean = _group_sums(x.sum((1, 2)), groups) / count
    square = _group_sums(jnp.square(x).sum((1, 2)), groups) / count
    inverse = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + NORM_EPSILON)
    return _spread(mean, channels), _spread(inverse, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise_groups(x: Array, scale: Array, bias: Array, groups: int) -> Array:
    """Flax's `GroupNorm`, in half the passes over the images, its gradient too.

    Args:
      x: [B, H, W, F] float.
      scale: [F] float.
      bias: [F] float.
      groups: of equally many channels; a divisor of F.
    """
    return _norm_forward(x, scale, bias, groups)[0]


def _norm_forward(
    x: Array, scale: Array, bias: Array, groups: int
) -> tuple[Array, tuple[Array, ...]]:
    mean, inverse = _measure_groups(x, groups)
    factor = inverse * scale[None]
    shift = bias[None] - mean * factor
    out = x * factor[:, None, None] + shift[:, None, None]
    return out.astype(x.dtype), (x, scale, mean, inverse)


def _norm_backward(
    groups: int, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = saved
    count, channels = x[0].size // groups, x.shape[-1]
    grad = grad.astype(jnp.float32)
    total = grad.sum((1, 2))  # [B, F]
    along = ((grad * x).sum((1, 2)) - mean * total) * inverse  # times normalised x
    average = lambda sums: _spread(
        _group_sums(sums * scale[None], groups) / count, channels
    )
    slope = -jnp.square(inverse) * average(along)
    shift = -inverse * average(total) - mean * slope
    factor = inverse * scale[None]
    wide = lambda values: values[:, None, None]
    grad_x = grad * wide(factor) + x * wide(slope) + wide(shift)
    like_scale = lambda sums: sums.sum(0).astype(scale.dtype)
    return grad_x.astype(x.dtype), like_scale(along), like_scale(total)


normalise_groups.defvjp(_norm_forward, _norm_backward)


class GroupNorm(nn.Module):
    """`normalise_groups` with the parameters of `nn.GroupNorm`."""

    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return normalise_groups(x, scale, bias, self.groups)


def group_norm(x: Array, name: str) -> Array:
    """GroupNorm with equal groups of about 8 channels; call it in a compact module."""
    groups = max(1, x.shape[-1] // 8)
    while x.shape[-1] % groups:  # 28 channels are two groups, not three
        groups -= 1
    return GroupNorm(groups, name=name)(x)


def random_bytes(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform uint8 of a shape with at least one axis, four from each random word.

    The bytes of a word lie far apart along the last axis, so that loops vectorise.
    """
    *leading, last = shape
    words = jax.random.bits(key, (*leading, -(-last // 4)), jnp.uint32)
    parts = [(words >> shift).astype(jnp.uint8) for shift in (0, 8, 16, 24)]
    return jnp.concatenate(parts, axis=-1)[..., :last]


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries at random and scales up the others; nothing where key is None.

    Args:
      x: float array.
      rate: share in [0, 1) of entries to drop, rounded to 1/256 and at most 255/256, as
        one random byte decides on each entry.
      key: a JAX key, consumed.
    """
    dropped = min(round(256 * rate), 255)
    if key is None or dropped == 0:
        return x
    kept = random_bytes(key, x.shape) >= dropped
    return jnp.where(kept, x * (256 / (256 - dropped)), 0.0)
