"""The decision under load bounds: most fitness in total, and every expert in use.

    maximise    sum_ce x_ce s_ce
    subject to  sum_e x_ce = k_c,  low_e <= sum_c w_c x_ce <= high_e,  x_ce in {0, 1}

Where every weight is 1 this is a transportation problem, whose linear program has
integral solutions, and the result is optimal: prices bring the loads near their bounds
and least-cost chains of moves through the experts do the rest. With other weights (a
generalised assignment problem, NP-hard) single moves repair and improve what the prices
give; nothing proves that they end within bounds that can hold. Where weights are 1,
bounds that cannot hold are missed by the least number of slots.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.align.prices import Bounds, find_prices, find_span, sum_load
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.models.submodel import held_mask
from fedmoe_jax.types import Array, Assignment

TOLERANCE = 1e-6  # of the scores' range, below which costs are equal


def violation(load: Array, bounds: Bounds) -> Array:
    """[..., E] float32 >= 0, how far each load [..., E] lies outside its bounds."""
    low, high = (jnp.broadcast_to(b, load.shape) for b in (bounds.low, bounds.high))
    return jnp.maximum(jnp.maximum(load - high, low - load), 0.0)


def price_moves(scores: Array, assignment: Assignment) -> Array:
    """The cost for a client of swapping the expert of a slot for another: [C, K, E].

    Infinite where the slot is empty or the client holds the other expert already.
    """
    held, slot = assignment.held, assignment.slot
    mask = jax.vmap(functools.partial(held_mask, num_experts=scores.shape[1]))(
        held, slot
    )
    own = jnp.take_along_axis(scores, held, axis=1)
    cost = own[:, :, None] - scores[:, None]
    return jnp.where(slot[:, :, None] & ~mask[:, None], cost, jnp.inf)


def cheapest_moves(cost: Array, held: Array) -> tuple[Array, Array]:
    """The cheapest move of one slot from expert to expert, and its slot.

    Args:
      cost: [C, K, E] float32, of moving each slot to each expert.
      held: [C, K] int32, the expert in each slot.

    Returns:
      cost [E, E] float32, infinite where no client can; slot [E, E] int32, an index
      into the flattened [C, K].
    """
    num_experts = cost.shape[2]
    cost, held = cost.reshape(-1, num_experts), held.reshape(-1)
    least = jnp.full((num_experts, num_experts), jnp.inf).at[held].min(cost)
    index = jnp.where(cost == least[held], jnp.arange(len(held))[:, None], -1)
    return least, jnp.full(least.shape, -1).at[held].max(index)


def shortest_chains(cost: Array, tolerance: Array) -> tuple[Array, Array]:
    """Cheapest chains of moves (Floyd and Warshall): cost and next expert, [E, E]."""
    num_experts = cost.shape[0]

    def through(middle, carry):
        cost, hop = carry
        detour = cost[:, middle, None] + cost[None, middle]
        better = detour < cost - tolerance
        return jnp.where(better, detour, cost), jnp.where(
            better, hop[:, middle, None], hop
        )

    hop = jnp.tile(jnp.arange(num_experts)[None], (num_experts, 1))
    return jax.lax.fori_loop(0, num_experts, through, (cost, hop))


def choose_chain(
    cost: Array, load: Array, bounds: Bounds, tolerance: Array
) -> tuple[Array, Array, Array]:
    """The chain that mends most, or else gains most: first, last expert, whether any.

    A chain takes one slot from its first expert and gives one to its last.
    """
    give = jnp.where(load > bounds.high, -1, jnp.where(load <= bounds.low, 1, 0))
    take = jnp.where(load < bounds.low, -1, jnp.where(load >= bounds.high, 1, 0))
    harm = give[:, None] + take[None]
    possible = jnp.isfinite(cost) & ~jnp.eye(len(load), dtype=bool)
    useful = possible & ((harm < 0) | ((harm == 0) & (cost < -tolerance)))
    most = jnp.where(useful, harm, 3).min()
    best = jnp.where(useful & (harm == most), cost, jnp.inf).argmin()
    first, last = jnp.unravel_index(best, cost.shape)
    return first, last, useful.any()


def follow_chain(
    held: Array, slot_of: Array, hop: Array, first: Array, last: Array
) -> Array:
    """Makes the moves of one chain in the flattened slots `held` [C * K]."""

    def unfinished(carry):
        expert, count, _ = carry
        return (expert != last) & (count < hop.shape[0])

    def move(carry):
        expert, count, held = carry
        to = hop[expert, last]
        return to, count + 1, held.at[slot_of[expert, to]].set(to)

    start = first, jnp.zeros((), jnp.int32), held
    return jax.lax.while_loop(unfinished, move, start)[2]


def mend_counts(scores: Array, assignment: Assignment, bounds: Bounds) -> Assignment:
    """Chains of moves until no bound and no score can be improved (weights of 1).

    An assignment that is the best for its own loads stays so along cheapest chains.
    """
    num_experts = scores.shape[1]
    tolerance = TOLERANCE * find_span(scores)

    def search(held: Array) -> tuple:
        current = Assignment(held, assignment.slot)
        cost, slot_of = cheapest_moves(price_moves(scores, current), held)
        cost, hop = shortest_chains(cost, tolerance)
        load = sum_load(current, bounds.weight, num_experts)
        return *choose_chain(cost, load, bounds, tolerance), slot_of, hop

    def step(carry):
        held, (first, last, _, slot_of, hop), count = carry
        held = follow_chain(held.reshape(-1), slot_of, hop, first, last)
        held = held.reshape(assignment.held.shape)
        return held, search(held), count + 1

    start = assignment.held, search(assignment.held), jnp.zeros((), jnp.int32)
    more = lambda carry: carry[1][2] & (carry[2] < assignment.held.size)
    return assignment.replace(held=jax.lax.while_loop(more, step, start)[0])


def change_violation(held: Array, load: Array, bounds: Bounds) -> Array:
    """Change of the total violation by moving each slot to each expert: [C, K, E]."""
    now, each = violation(load, bounds)[None], bounds.weight[:, None]
    given = violation(load[None] - each, bounds) - now  # [C, E]
    taken = violation(load[None] + each, bounds) - now
    return jnp.take_along_axis(given, held, axis=1)[:, :, None] + taken[:, None]


def choose_move(cost: Array, change: Array, span: Array, small: Array) -> Array:
    """Ranks moves [C, K, E]: those that mend, by cost per load mended, then gains.

    Args:
      cost: of the score, infinite where there is no such move.
      change: of the total violation.
      span: [] range of the scores; no cost is larger.
      small: [] load that is too small to count.

    Returns:
      [C, K, E], the smaller the better, infinite for what helps nothing.
    """
    mends = jnp.isfinite(cost) & (change < -small)
    gains = (change <= 0) & (cost < -TOLERANCE * span) & ~mends.any()
    rate = (cost + 2 * span) / jnp.where(mends, -change, 1.0)
    return jnp.where(mends, rate, jnp.where(gains, cost, jnp.inf))


def choose_apart(rank: Array) -> Array:
    """Moves [E, E] bool that are the best for both of their experts.

    No expert is in two of them, so that none changes what another is worth. The best of
    all is one of them, if any rank is finite.
    """
    flat = jnp.arange(rank.size).reshape(rank.shape)
    best = jnp.minimum(rank.min(axis=1), rank.min(axis=0))  # [E], from or to each
    leaving = jnp.where(rank == best[:, None], flat, rank.size).min(axis=1)
    coming = jnp.where(rank == best[None], flat, rank.size).min(axis=0)
    choice = jnp.minimum(leaving, coming)
    mutual = (choice[:, None] == flat) & (choice[None] == flat)
    return mutual & jnp.isfinite(rank)


def mend_loads(scores: Array, assignment: Assignment, bounds: Bounds) -> Assignment:
    """Moves until none mends a bound, nor gains without harm (any weights)."""
    num_experts = scores.shape[1]
    span, small = find_span(scores), 1e-3 * bounds.weight.min()

    def search(held: Array) -> tuple[Array, Array]:
        current = Assignment(held, assignment.slot)
        load = sum_load(current, bounds.weight, num_experts)
        change = change_violation(held, load, bounds)
        rank = choose_move(price_moves(scores, current), change, span, small)
        rank, slot_of = cheapest_moves(rank, held)
        chosen = choose_apart(rank)
        return jnp.where(chosen, slot_of, held.size), chosen.any()

    def step(carry: tuple) -> tuple:
        held, (slot_of, _), count = carry
        to = jnp.tile(jnp.arange(num_experts, dtype=held.dtype)[None], (num_experts, 1))
        flat = held.reshape(-1).at[slot_of].set(to, mode="drop")
        held = flat.reshape(held.shape)
        return held, search(held), count + 1

    start = assignment.held, search(assignment.held), jnp.zeros((), jnp.int32)
    more = lambda carry: carry[1][1] & (carry[2] < assignment.held.size)
    return assignment.replace(held=jax.lax.while_loop(more, step, start)[0])


def bounded_top_k(
    scores: Array, capacity: Array, bounds: Bounds, *, max_held: int, whole: bool
) -> Assignment:
    """Every client takes as many experts as it can hold, and loads keep to the bounds.

    Args:
      scores: [C, E] float32, finite.
      capacity: [C] int32, clipped to [1, K].
      bounds: of the experts' loads.
      max_held: K, at most E.
      whole: whether all weights are 1 and all bounds whole numbers; then the total
        score is the largest possible.

    Returns:
      The assignment; in each row k_c distinct experts, in no particular order.
    """
    chex.assert_rank(scores, 2)
    chex.assert_shape([capacity, bounds.weight], (scores.shape[0],))
    chex.assert_shape([bounds.low, bounds.high], (scores.shape[1],))
    prices = find_prices(scores, capacity, bounds, max_held)
    start = top_k(scores - bounds.weight[:, None] * prices[None], capacity, max_held)
    return (mend_counts if whole else mend_loads)(scores, start, bounds)
