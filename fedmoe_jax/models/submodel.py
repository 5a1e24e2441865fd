"""The part of the model that one client holds."""

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, PyTree


def held_mask(held: Array, slot: Array, num_experts: int) -> Array:
    """Which experts ONE client holds, [E] bool, from its slots [K]."""
    chex.assert_equal_shape([held, slot])
    return jnp.zeros(num_experts, bool).at[held].max(slot)


def is_local(held: Array, num_experts: int, local_experts: int) -> Array:
    """Which of the held experts [K] never leave the client: the last ones of E."""
    return held >= num_experts - local_experts


def take_submodel(
    params: PyTree, personal: PyTree, held: Array, local_experts: int
) -> PyTree:
    """ONE client's sub-model: stem, head, all gate rows, the held experts [K, ...].

    Args:
      params: the server's.
      personal: the client's own parts, instead of the server's.
      held: [K] int32, expert ids.
      local_experts: how many experts, the last ones, are the client's own.
    """
    parts = {
        part: personal.get(part, params[part]) for part in ("stem", "gate", "head")
    }
    experts = jax.tree.map(lambda leaf: leaf[held], params["experts"])
    if "experts" in personal:

        def choose(kept: Array, sent: Array) -> Array:
            local = is_local(held, kept.shape[0], local_experts)
            shape = local.shape + (1,) * (sent.ndim - 1)
            return jnp.where(local.reshape(shape), kept[held], sent)

        experts = jax.tree.map(choose, personal["experts"], experts)
    return parts | {"experts": experts}
