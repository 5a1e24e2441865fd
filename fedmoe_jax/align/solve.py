"""The decision: from scores and capacities to held experts (paper III-B-4)."""

import functools

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.align.usage import normalise_usage
from fedmoe_jax.types import Array, Assignment


def fill_slots(capacity: Array, max_held: int) -> Array:
    """Valid slots [C, K] bool of `capacity` [C] int32, which is clipped to [1, K]."""
    capacity = jnp.clip(capacity, 1, max_held)
    return jnp.arange(max_held)[None] < capacity[:, None]


def _rank(scores: Array, max_held: int) -> Array:
    """Ids [..., K] of the K best scores [..., E], ties to the lowest id, NaN last."""
    # `lax.top_k` orders by bit pattern, so NaN and minus zero need one spelling.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    scores = jnp.where(scores == 0, 0.0, scores)
    return jax.lax.top_k(scores, max_held)[1].astype(jnp.int32)


def top_k(scores: Array, capacity: Array, max_held: int) -> Assignment:
    """Every client takes its best experts, as many as it can hold.

    Args:
      scores: [C, E] float32, any values; NaN ranks with minus infinity, last.
      capacity: [C] int32, clipped to [1, K].
      max_held: K, at most E.

    Returns:
      The exact top k_c of each row, best first, ties to the lowest expert id.
    """
    chex.assert_rank(scores, 2)
    chex.assert_shape(capacity, (scores.shape[0],))
    return Assignment(_rank(scores, max_held), fill_slots(capacity, max_held))


def held_mask(held: Array, slot: Array, num_experts: int) -> Array:
    """Which experts ONE client holds, [E] bool, from its slots [K]."""
    chex.assert_equal_shape([held, slot])
    return jnp.zeros(num_experts, bool).at[held].max(slot)


def to_mask(assignment: Assignment, num_experts: int) -> Array:
    """The assignment as [C, E] bool: does the client hold the expert?"""
    one_client = functools.partial(held_mask, num_experts=num_experts)
    return jax.vmap(one_client)(assignment.held, assignment.slot)


def expected_load(load: Array, held: Array, num_active: int) -> Array:
    """Examples that each held expert of a client can expect in one round.

    Args:
      load: [...] float32, examples that the client trains.
      held: [...] int32 >= 1, experts that the client holds.
      num_active: A, experts per example.

    Returns:
      [...] float32, `load * min(A, held) / held`.
    """
    return load * jnp.minimum(num_active, held) / held


def running_top_k(
    scores: Array,
    usage: Array,
    usage_weight: Array,
    load: Array,
    capacity: Array,
    order: Array,
    max_held: int,
    num_active: int,
) -> Assignment:
    """Like `top_k`, but every pick is seen by the clients that pick later.

    Clients that read one usage vector all move to the same experts at once. Here they
    walk in `order` through a compiled loop of C steps, and each adds the load that its
    experts can expect to the usage before the next one looks.

    Args:
      scores: [C, E] float32, without the usage; NaN ranks last.
      usage: [E] float32 >= 0, examples, before this round.
      usage_weight: [C] float32, weight of the normalised running usage.
      load: [C] float32, examples each client trains in one round.
      capacity: [C] int32, clipped to [1, K].
      order: [C] int32, a permutation of the rows.
      max_held: K, at most E.
      num_active: A, experts per example.

    Returns:
      The assignment, rows in the order of `scores`.
    """
    chex.assert_shape(usage, (scores.shape[1],))
    chex.assert_equal_shape([usage_weight, load, capacity, order])
    slot = fill_slots(capacity, max_held)
    share = expected_load(load, slot.sum(axis=1), num_active)

    def pick(usage: Array, row: tuple) -> tuple[Array, Array]:
        scores, weight, share, slot = row
        held = _rank(scores - weight * normalise_usage(usage), max_held)
        return usage.at[held].add(jnp.where(slot, share, 0.0)), held

    rows = jax.tree.map(lambda x: x[order], (scores, usage_weight, share, slot))
    held = jax.lax.scan(pick, usage, rows)[1]
    return Assignment(jnp.zeros_like(held).at[order].set(held), slot)
