"""The decision: from scores and capacities to held experts (paper III-B-4).

XLA's `top_k` sorts every row on CPU. For large cohorts and few slots, K rounds of
maximum and first arg-maximum are several times faster there, if a block of clients
stays in the cache and its experts lie along the first axis, so that reductions over
experts become elementwise vector operations over clients.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from fedmoe_jax.align.usage import normalise_usage
from fedmoe_jax.models.submodel import held_mask
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, PyTree, Sizes

MAX_ROUNDS = 16  # beyond, the program grows too long; sorting wins only later
RANK_BLOCK = 8_192  # scores ranked at once, 32 kB: the first-level cache
DECIDE_BLOCK = 131_072  # scores decided on at once, 512 kB: the second-level cache


def fill_slots(capacity: Array, max_held: int) -> Array:
    """Valid slots [C, K] bool of `capacity` [C] int32, which is clipped to [1, K]."""
    capacity = jnp.clip(capacity, 1, max_held)
    return jnp.arange(max_held)[None] < capacity[:, None]


def _map_blocks(decide: Callable, rows: PyTree, size: int) -> PyTree:
    """`decide` on every `size` rows, results stacked; the last block may overlap.

    `dynamic_slice` moves a block that would run over the end back until it fits.
    """

    def block(start: Array) -> PyTree:
        take = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size)
        return decide(jax.tree.map(take, rows))

    count = jax.tree.leaves(rows)[0].shape[0]
    return lax.map(block, jnp.arange(0, count, size))


def _join_blocks(blocks: Array, count: int) -> Array:
    """Rows [count, ...] from the stacked results [blocks, size, ...]."""
    size = blocks.shape[1]
    rows = blocks.reshape(-1, *blocks.shape[2:])
    return jnp.concatenate([rows[: count - size], rows[-size:]])


def in_blocks(
    decide: Callable[[Evidence], Assignment], evidence: Evidence
) -> Assignment:
    """`decide(evidence)`, on CPU one block of clients after the other.

    No intermediate result is larger than a block, and blocks stay in the cache. As in
    `top_k` the platform is that for which a program is lowered.

    Args:
      decide: decides for every client by itself.
      evidence: of the whole cohort.
    """
    count, num_experts = evidence.fitness.shape
    size = max(64, DECIDE_BLOCK // num_experts)
    if count <= size:
        return decide(evidence)

    def decide_block(rows: dict[str, Array]) -> Assignment:
        return decide(evidence.replace(**rows))

    def decide_in_turn(evidence: Evidence) -> Assignment:
        names = ("client", "fitness", "capacity", "size", "load", "held", "times_held")
        rows = {name: getattr(evidence, name) for name in names}
        blocks = _map_blocks(decide_block, rows, size)
        return jax.tree.map(lambda leaf: _join_blocks(leaf, count), blocks)

    return lax.platform_dependent(evidence, cpu=decide_in_turn, default=decide)


def _rank_by_sort(scores: Array, max_held: int) -> Array:
    # `lax.top_k` orders by bit pattern, so NaN and minus zero need one spelling.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    scores = jnp.where(scores == 0, 0.0, scores)
    return lax.top_k(scores, max_held)[1].astype(jnp.int32)


def _sort_key(scores: Array) -> Array:
    """int32 in the order of float32 scores; zeros are equal, NaN is -inf."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    size, infinity = bits & 0x7FFFFFFF, 0x7F800000
    return jnp.where(size > infinity, -infinity, jnp.where(bits < 0, -size, size))


def _rank_block(scores: Array, max_held: int) -> Array:
    """Ids [K, B] of the K best scores of each row of a block [B, E]."""
    key = _sort_key(scores.T)
    expert = lax.broadcasted_iota(jnp.int32, key.shape, 0)
    held = []
    for _ in range(max_held):
        best = key == key.max(axis=0)[None]
        held.append(jnp.where(best, expert, key.shape[0]).min(axis=0))
        key = jnp.where(expert == held[-1][None], jnp.iinfo(jnp.int32).min, key)
    return jnp.stack(held)


def _rank_by_rounds(scores: Array, max_held: int, size: int) -> Array:
    rank = functools.partial(_rank_block, max_held=max_held)
    blocks = _map_blocks(rank, scores, size)  # [blocks, K, size]
    return _join_blocks(blocks.swapaxes(1, 2), scores.shape[0])


def _rank(scores: Array, max_held: int) -> Array:
    """Ids [C, K] of the K best scores [C, E], ties to the lowest id, NaN last."""
    count, num_experts = scores.shape
    size = max(64, RANK_BLOCK // num_experts)
    by_sort = functools.partial(_rank_by_sort, max_held=max_held)
    if max_held > MAX_ROUNDS or count < size:
        return by_sort(scores)
    by_rounds = functools.partial(_rank_by_rounds, max_held=max_held, size=size)
    return lax.platform_dependent(scores, cpu=by_rounds, default=by_sort)


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
    chex.assert_axis_dimension_gteq(scores, 1, max_held)
    chex.assert_shape(capacity, (scores.shape[0],))
    return Assignment(_rank(scores, max_held), fill_slots(capacity, max_held))


def hold_all(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds all E = K experts, whatever its capacity; an `AssignFn`."""
    shape = (evidence.client.shape[0], sizes.num_experts)
    held = jnp.broadcast_to(jnp.arange(sizes.num_experts, dtype=jnp.int32), shape)
    return Assignment(held, jnp.ones(shape, bool))


def give_all_slots(config: ConfigDict) -> ConfigDict:
    """A slot for every expert, in the config of a strategy's program."""
    config.max_held = config.num_experts
    return config


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


def _pick_by_sort(scores: Array, lots: Array, max_held: int) -> Array:
    """Ids [K] of the K best of ONE client's scores [E], of equals by least lot."""
    shuffled = jnp.argsort(lots).astype(jnp.int32)
    return shuffled[_rank_by_sort(scores[shuffled], max_held)]


def _pick_by_rounds(scores: Array, lots: Array, max_held: int) -> Array:
    """As `_pick_by_sort`, which takes three times as long for few slots on CPU."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    expert, held = jnp.arange(len(scores), dtype=jnp.int32), []
    for _ in range(max_held):
        best = jnp.where(lots < jnp.inf, scores, -jnp.inf).max()
        left = jnp.where(scores == best, lots, jnp.inf)
        held.append(jnp.where(left == left.min(), expert, len(expert)).min())
        lots = jnp.where(expert == held[-1], jnp.inf, lots)
    return jnp.stack(held)


def running_top_k(
    scores: Array,
    usage: Array,
    usage_weight: Array,
    load: Array,
    capacity: Array,
    order: Array,
    lots: Array,
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
      lots: [C, E] float32; of equal experts those with the least lots are picked.
      max_held: K, at most E.
      num_active: A, experts per example.

    Returns:
      The assignment, rows in the order of `scores`.
    """
    chex.assert_shape(usage, (scores.shape[1],))
    chex.assert_equal_shape([usage_weight, load, capacity, order])
    slot = fill_slots(capacity, max_held)
    share = expected_load(load, slot.sum(axis=1), num_active)
    pick_best = _pick_by_sort if max_held > MAX_ROUNDS else _pick_by_rounds

    def pick(usage: Array, row: tuple) -> tuple[Array, Array]:
        scores, weight, share, slot, lots = row
        held = pick_best(scores - weight * normalise_usage(usage), lots, max_held)
        return usage.at[held].add(jnp.where(slot, share, 0.0)), held

    rows = scores, usage_weight, share, slot, lots
    rows = jax.tree.map(lambda x: x[order], rows)
    held = lax.scan(pick, usage, rows)[1]
    return Assignment(jnp.zeros_like(held).at[order].set(held), slot)
