"""The parts of a transformer block, as pure functions of one batch of sequences.

Norms are RMSNorm (arXiv 1910.07467), positions rotary (arXiv 2104.09864), heads share
keys and values in groups (arXiv 2305.13245), hidden layers are SwiGLU (arXiv
2002.05202).
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.models.precision import einsum_float32
from fedmoe_jax.types import Array, PyTree

EPSILON = 1e-6  # of a mean square
BASE = 10_000.0  # of the wavelengths of rotary positions


def normalise(x: Array, scale: Array) -> Array:
    """RMSNorm over the last axis: x [..., D], scale [D]."""
    return normalise_axes(x, scale, EPSILON)


def normalise_axes(x: Array, scale: Array, epsilon: float) -> Array:
    """RMSNorm over the last axes, as many as `scale` has, in float32: x [..., *scale].

    `epsilon` is added to the mean square.
    """
    wide = x.astype(jnp.float32)
    last = tuple(range(-scale.ndim, 0))
    square = jnp.square(wide).mean(axis=last, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return (wide * jax.lax.rsqrt(square + epsilon) * scale).astype(x.dtype)


def rotate(x: Array) -> Array:
    """Rotary positions of heads [B, H, P, W], with W even; position 0 stays."""
    width = x.shape[3]
    return turn(x, BASE ** (-jnp.arange(width // 2) / (width // 2)))


def turn(x: Array, rate: Array) -> Array:
    """Turns pairs of heads [B, H, P, W] by `rate` [W / 2] radians a position."""
    length = x.shape[2]
    angle = jnp.arange(length)[None, None, :, None] * rate[None, None, None]
    cos, sin = (turned(angle).astype(x.dtype) for turned in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def attend(params: PyTree, x: Array) -> Array:
    """Causal attention with grouped heads.

    Args:
      params: `query` [D, H, W], `key` and `value` [D, H', W], H a multiple of H', and
        `out` [H, W, D].
      x: [B, P, D].

    Returns:
      [B, P, D].
    """
    query, key, value = (
        jnp.einsum("bpd,dhw->bhpw", x, params[name])
        for name in ("query", "key", "value")
    )
    mixed = mix_values(rotate(query), rotate(key), value)
    return jnp.einsum("bhpw,hwd->bpd", mixed, params["out"])


def mix_values(query: Array, key: Array, value: Array) -> Array:
    """The values of the positions so far, by the softmax of queries times keys.

    On CPU it takes two thirds of the time with the heads before the positions, and with
    the sums of the softmax divided out of its products instead of its weights. The
    softmax is float32.

    Args:
      query: [B, H, P, W], turned.
      key: [B, H', P, W], likewise, H a multiple of H'.
      value: [B, H', P, W].

    Returns:
      [B, H, P, W].
    """
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(each, groups, axis=1) for each in (key, value))
    scores: Array = einsum_float32("bhpw,bhqw->bhpq", query, key)
    past = jnp.tri(query.shape[2], dtype=bool)
    scores = jnp.where(past[None, None], scores, -jnp.inf)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    lower = weights.astype(value.dtype)
    mixed: Array = einsum_float32("bhpq,bhqw->bhpw", lower, value)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)


def feed_forward(params: PyTree, x: Array) -> Array:
    """SwiGLU: `gate` and `up` [D, F], `down` [F, D], x [..., D]."""
    hidden = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
    return hidden @ params["down"]


def average_prefix(x: Array) -> Array:
    """The mean of each position and those before it, float32; x [B, P, D]."""
    count = jnp.arange(1, x.shape[1] + 1, dtype=jnp.float32)
    return jnp.cumsum(x, axis=1, dtype=jnp.float32) / count[None, :, None]


def draw(key: Array, *shape: int, fan_in: int) -> Array:
    """Normal weights with the variance 1 / `fan_in`."""
    return jax.random.normal(key, shape) / jnp.sqrt(fan_in)


def init_attention(key: Array, width: int, heads: int, kv_heads: int) -> PyTree:
    """Params of `attend`, of heads that have `width / heads` numbers each."""
    keys, size = jax.random.split(key, 4), width // heads
    return {
        "query": draw(keys[0], width, heads, size, fan_in=width),
        "key": draw(keys[1], width, kv_heads, size, fan_in=width),
        "value": draw(keys[2], width, kv_heads, size, fan_in=width),
        "out": draw(keys[3], heads, size, width, fan_in=width),
    }


def init_feed_forward(key: Array, width: int, hidden: int) -> PyTree:
    """Params of `feed_forward`."""
    keys = jax.random.split(key, 3)
    return {
        "gate": draw(keys[0], width, hidden, fan_in=width),
        "up": draw(keys[1], width, hidden, fan_in=width),
        "down": draw(keys[2], hidden, width, fan_in=hidden),
    }
