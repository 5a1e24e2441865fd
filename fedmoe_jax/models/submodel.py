"""The part of the model that one client holds."""

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.types import Array, PyTree


def held_mask(held: Array, slot: Array, num_experts: int) -> Array:
    """[E] bool, the experts that ONE client holds, from its slots [K]."""
    chex.assert_equal_shape([held, slot])
    return jnp.zeros(num_experts, bool).at[held].max(slot)


def is_local(held: Array, num_experts: int, local_experts: int) -> Array:
    """[K] bool, the held experts that never leave the client: the last ones of E."""
    return held >= num_experts - local_experts


def take_experts(
    sent: PyTree, personal: PyTree | None, held: Array, local_experts: int
) -> PyTree:
    """The held experts [K, ...] of ONE layer: the client's own where they are local.

    Args:
      sent: the server's, leaves [E, ...].
      personal: the client's, likewise, or None.
      held: [K] int32, expert ids.
      local_experts: see `take_submodel`.
    """
    experts = jax.tree.map(lambda leaf: leaf[held], sent)
    if personal is None:
        return experts

    def choose(kept: Array, taken: Array) -> Array:
        local = is_local(held, kept.shape[0], local_experts)
        shape = local.shape + (1,) * (taken.ndim - 1)
        return jnp.where(local.reshape(shape), kept[held], taken)

    return jax.tree.map(choose, personal, experts)


def take_submodel(
    params: PyTree, personal: PyTree, held: Array, local_experts: int
) -> PyTree:
    """ONE client's sub-model: all of the params, but only the held experts.

    Args:
      params: the server's.
      personal: the client's own parts, instead of the server's.
      held: [G, K] int32, expert ids.
      local_experts: how many experts of a layer, the last ones, are the client's own.

    Returns:
      Like params, the leaves under `experts` are [K, ...].
    """
    own = personal.get("experts", {})
    experts = {
        name: take_experts(
            params["experts"][name], own.get(name), held[layer], local_experts
        )
        for layer, name in enumerate(layer_names(params["experts"]))
    }
    parts = {part: personal.get(part, tree) for part, tree in params.items()}
    return parts | {"experts": experts}
