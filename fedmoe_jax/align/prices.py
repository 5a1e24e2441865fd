"""Prices of experts at which clients that choose for themselves keep to load bounds.

The dual of the assignment under bounds, see `bounded.py`: every client takes its k_c
experts of the highest score less price, and prices rise where the load is too high.
"""

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.types import Array, Assignment

NEWTON_STEPS, SETTLE_STEPS = 16, 30
COARSEST, RIDGE = 0.05, 0.05
GROW, SHRINK = 1.2, 0.5


class Bounds(struct.PyTreeNode):
    """The bounds of every expert's load.

    Attributes:
      weight: [C] float32 > 0, load of one slot of each client.
      low: [E] float32 >= 0.
      high: [E] float32 >= low.
    """

    weight: Array
    low: Array
    high: Array


def sum_load(assignment: Assignment, weight: Array, num_experts: int) -> Array:
    """[E] float32, weight of the clients that hold each expert."""
    load = jnp.where(assignment.slot, weight[:, None], 0.0)
    return jnp.zeros(num_experts).at[assignment.held].add(load)


def find_span(scores: Array) -> Array:
    """[] float32 > 0, range of the scores; tiny where all are equal."""
    return jnp.maximum(scores.max() - scores.min(), 1e-6)


def excess(price: Array, load: Array, bounds: Bounds) -> Array:
    """The excess of each load [E] over the one its price [E] wants: a subgradient.

    A price above 0 wants the upper bound tight, one below 0 the lower bound, and no
    price any load between them.
    """
    wanted = jnp.clip(load, bounds.low, bounds.high)
    wanted = jnp.where(price > 0, bounds.high, wanted)
    return load - jnp.where(price < 0, bounds.low, wanted)


def stop_at_zero(price: Array, moved: Array) -> Array:
    """Prices `moved` [E], but 0 where that is between them and `price`."""
    return jnp.where(price * moved < 0, 0.0, moved)


def count_marginal(
    scores: Array, capacity: Array, weight: Array, softness: Array, max_held: int
) -> tuple[Array, Array]:
    """Loads [E] of the best experts, and how they would follow the prices: [E, E].

    A slot is marginal for an expert whose score is within `softness` of the threshold
    between held and not held. Where a price rises, marginal slots leave for the experts
    that are marginal for the same client.
    """
    more = min(max_held + 1, scores.shape[1])
    best = top_k(scores, jnp.full_like(capacity, more), more).held
    ranked = jnp.take_along_axis(scores, best, axis=1)
    last = jnp.clip(capacity, 1, max_held)[:, None] - 1
    least = jnp.take_along_axis(ranked, last, axis=1)
    next_best = jnp.take_along_axis(ranked, jnp.minimum(last + 1, more - 1), axis=1)
    load = weight @ (scores >= least)
    soft = jax.nn.sigmoid((scores - (least + next_best) / 2) / softness)
    marginal = soft * (1 - soft) / softness  # [C, E]
    flow = weight[:, None] ** 2 * marginal
    share = marginal / (marginal.sum(axis=1, keepdims=True) + 1e-9)
    return load, jnp.diag(flow.sum(axis=0)) - flow.T @ share


def approach_prices(
    scores: Array, capacity: Array, bounds: Bounds, max_held: int
) -> Array:
    """Prices [E] near the dual's optimum, by Newton's method on softened loads.

    The softness falls from a twentieth of the scores' range until about two clients are
    marginal for an expert.
    """
    span, count = find_span(scores), scores.shape[0]
    finest = min(COARSEST, 2 / count)
    ratio = (finest / COARSEST) ** (1 / (NEWTON_STEPS - 1))
    longest = span / 5 / bounds.weight.mean()

    def step(number: Array, price: Array) -> Array:
        net = scores - bounds.weight[:, None] * price[None]
        softness = span * COARSEST * ratio**number
        load, slope = count_marginal(net, capacity, bounds.weight, softness, max_held)
        above = excess(price, load, bounds)
        free = (above != 0) | (price != 0)  # the others stay at 0
        slope = jnp.where(free[:, None] & free[None], slope, 0.0)
        # All prices may rise together without any change: a ridge fixes them.
        ridge = jnp.where(free, RIDGE * slope.diagonal() + 1e-6, 1.0)
        way = jax.scipy.linalg.solve(
            slope + jnp.diag(ridge), jnp.where(free, above, 0.0), assume_a="pos"
        )
        return stop_at_zero(price, price + jnp.clip(way, -longest, longest))

    return jax.lax.fori_loop(0, NEWTON_STEPS, step, jnp.zeros(scores.shape[1]))


def settle_prices(
    price: Array, scores: Array, capacity: Array, bounds: Bounds, max_held: int
) -> Array:
    """Prices [E] from nearby ones, by the sign of the excess of whole slots.

    Each expert's step grows while its price keeps moving one way and shrinks when it
    turns (Rprop).
    """
    num_experts = scores.shape[1]
    span = find_span(scores)

    def step(_, carry):
        price, size, last = carry
        best = top_k(scores - bounds.weight[:, None] * price[None], capacity, max_held)
        load = sum_load(best, bounds.weight, num_experts)
        way = jnp.sign(excess(price, load, bounds))
        size = size * jnp.where(way * last > 0, GROW, 1.0)
        size = size * jnp.where(way * last < 0, SHRINK, 1.0)
        return stop_at_zero(price, price + way * size), size, way

    first = span * min(1 / 8, 2 / scores.shape[0]) / bounds.weight.mean()
    start = price, jnp.full(num_experts, first), jnp.zeros(num_experts)
    return jax.lax.fori_loop(0, SETTLE_STEPS, step, start)[0]


def find_prices(scores: Array, capacity: Array, bounds: Bounds, max_held: int) -> Array:
    """Prices [E] per unit of load at which the clients' choices nearly fit the bounds.

    Args:
      scores: [C, E] float32, finite.
      capacity: [C] int32, clipped to [1, K].
      bounds: of the experts' loads.
      max_held: K, at most E.
    """
    prices = approach_prices(scores, capacity, bounds, max_held)
    return settle_prices(prices, scores, capacity, bounds, max_held)
