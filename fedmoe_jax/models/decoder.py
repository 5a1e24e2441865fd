"""The forward pass of a pretrained decoder, as pure functions of its weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import Route
from fedmoe_jax.models.precision import einsum_float32
from fedmoe_jax.models.routing import make_gates
from fedmoe_jax.models.transformer_parts import (
    feed_forward,
    mix_values,
    normalise_axes,
    turn,
)
from fedmoe_jax.pretrained.architecture import Architecture, Rope
from fedmoe_jax.pretrained.tensors import name_block
from fedmoe_jax.types import Array, PyTree

# (name of a projection, inputs) -> what is added to its outputs
Adapt = Callable[[str, Array], Array | float]


def list_rates(rope: Rope, width: int) -> np.ndarray:
    """Radians a position of each pair of a head's numbers: [width / 2] float64."""
    rate = rope.base ** -(np.arange(0, width, 2) / width)
    if rope.kind == "linear":
        return rate / rope.factor
    if rope.kind == "default":
        return rate
    waves = rope.context * rate / (2 * np.pi)  # that fit into the first context
    share = np.clip((waves - rope.low) / (rope.high - rope.low), 0.0, 1.0)
    return (1 - share) * rate / rope.factor + share * rate


def attend(
    params: PyTree, x: Array, arch: Architecture, adapt: Adapt = lambda *_: 0.0
) -> Array:
    """Causal attention: [B, P, D] -> [B, P, D].

    Args:
      params: of the block's `attention`.
      x: [B, P, D], normalised.
      arch: of the decoder.
      adapt: adds to a projection, of heads [B, P, H, W], or to the outputs.
    """

    def project(name: str) -> Array:
        heads = jnp.einsum("bpd,dhw->bphw", x, params[name]) + adapt(name, x)
        if name in arch.biased:
            heads = heads + params[f"{name}_bias"][None, None]
        if f"{name}_norm" in params:
            heads = normalise_axes(heads, params[f"{name}_norm"], arch.epsilon)
        return heads.swapaxes(1, 2)

    query, key, value = map(project, ("query", "key", "value"))
    rate = jnp.asarray(list_rates(arch.rope, arch.head_width), jnp.float32)
    mixed = mix_values(turn(query, rate), turn(key, rate), value)  # [B, H, P, W]
    out = jnp.einsum("bhpw,hwd->bpd", mixed, params["out"]) + adapt("out", mixed)
    return out + params["out_bias"][None, None] if "out" in arch.biased else out


def mix_all(block: PyTree, x: Array, arch: Architecture) -> Array:
    """The base's own mixture over all of its experts, [B, P, D] -> [B, P, D]."""
    mixture, tokens = arch.mixture, x.reshape(-1, x.shape[-1])
    assert mixture is not None
    slot = jnp.ones(mixture.experts, bool)
    how = Route(mixture.active, gating="chosen" if mixture.normalised else "all")
    gates = make_gates(tokens @ block["router"].T, slot, how)
    each = jax.vmap(feed_forward, in_axes=(0, None), out_axes=1)
    outputs = each(block["experts"], tokens)
    mixed = jnp.einsum("te,ted->td", gates.astype(x.dtype), outputs)
    return mixed.reshape(x.shape)


def add_shared(block: PyTree, x: Array) -> Array | float:
    """Outputs of the expert that sees every token, scaled by its gate; 0 without."""
    if "shared" not in block:
        return 0.0
    scale = jax.nn.sigmoid(x @ block["shared_gate"])[..., None]
    return scale * feed_forward(block["shared"], x)


def decode(weights: PyTree, tokens: Array, arch: Architecture) -> Array:
    """Logits [B, P, vocabulary] of tokens [B, P] int32."""
    x = weights["embedding"][tokens]
    for layer, mixes in enumerate(arch.mixes):
        block = weights[name_block(layer)]
        hidden = normalise_axes(x, block["before"], arch.epsilon)
        x = x + attend(block["attention"], hidden, arch)
        hidden = normalise_axes(x, block["after"], arch.epsilon)
        if mixes:
            x = x + mix_all(block, hidden, arch) + add_shared(block, hidden)
        else:
            x = x + feed_forward(block["hidden"], hidden)
    return answer(weights, x, arch)


def answer(weights: PyTree, x: Array, arch: Architecture) -> Array:
    """Logits [B, P, vocabulary] of the last hidden states [B, P, D]."""
    x = normalise_axes(x, weights["norm"], arch.epsilon)
    kernel = weights["embedding"].T if arch.tied else weights["head"]
    return einsum_float32("bpd,dv->bpv", x, kernel)
