"""Round robin: experts are assigned in turn."""

import jax.numpy as jnp

from fedmoe_jax.align.top_k import fill_slots
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Walks the experts as a ring; each client takes the next k_c in a row.

    In one round any two experts have the same number of holders, or differ by one.
    The walk starts one expert later each round, so a cohort that stays the same has
    equal holder counts, and every client has held every expert, after E rounds.
    """
    slot = fill_slots(evidence.capacity, sizes.max_held)
    count = slot.sum(axis=1, dtype=jnp.int32)
    first = evidence.round + jnp.cumsum(count) - count
    held = (first[:, None] + jnp.arange(sizes.max_held)[None]) % sizes.num_experts
    return Assignment(held.astype(jnp.int32), slot)


ROUND_ROBIN = Strategy(
    assign=assign,
    about="Assigns consecutive experts to the clients in turn and uses no feedback.",
)
