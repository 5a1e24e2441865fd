"""Ties between experts, which lots decide, so that low ids have no advantage.

Where no scores are equal, nothing here changes a decision by a bit.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.explore import uniform_scores
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.types import Array, Assignment

LOTS = 1400  # purpose, folded into the key of a decision


def draw_lots(key: Array, client: Array, num_experts: int) -> Array:
    """Lots [C, E] float32 in [0, 1), of each client's id and of this round.

    Args:
      key: of the decision, not consumed.
      client: [C] int32, client ids.
      num_experts: E.
    """
    return uniform_scores(jax.random.fold_in(key, LOTS), client, num_experts)


def find_tied(scores: Array, assignment: Assignment) -> Array:
    """Clients [C] bool whose last expert has the score of one that is left out."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    count = assignment.slot.sum(axis=1, keepdims=True)
    last = jnp.take_along_axis(assignment.held, count - 1, axis=1)
    least = jnp.take_along_axis(scores, last, axis=1)
    return (scores >= least).sum(axis=1) > count[:, 0]


def top_k_by_lot(
    scores: Array, capacity: Array, max_held: int, client: Array, key: Array
) -> Assignment:
    """As `top_k`, but ties between held and not held are drawn.

    Args:
      scores: [C, E] float32, any values; NaN ranks with minus infinity, last.
      capacity: [C] int32, clipped to [1, K].
      max_held: K, at most E.
      client: [C] int32, client ids.
      key: of the decision, not consumed.

    Returns:
      The assignment; rows without such ties are those of `top_k`.
    """
    best = top_k(scores, capacity, max_held)
    tied = find_tied(scores, best)

    def draw() -> Array:
        order = jnp.argsort(draw_lots(key, client, scores.shape[1]), axis=1)
        shuffled = jnp.take_along_axis(scores, order, axis=1)
        held = top_k(shuffled, capacity, max_held).held
        held = jnp.take_along_axis(order, held, axis=1).astype(jnp.int32)
        return jnp.where(tied[:, None], held, best.held)

    # For large populations drawing costs more than deciding.
    return best.replace(held=jax.lax.cond(tied.any(), draw, lambda: best.held))


def first_by_lot(scores: Array, lots: Array) -> Array:
    """The place of the largest score along the last axis, of equals by least lot."""
    best = scores == scores.max(axis=-1, keepdims=True)
    return jnp.where(best, lots, jnp.inf).argmin(axis=-1)


def raise_tied(scores: Array, lots: Array, most: float) -> Array:
    """Scores [C, E] in which those that a client has twice are raised by lots.

    Args:
      scores: [C, E] float32, finite.
      lots: [C, E] float32 in [0, 1).
      most: largest rise, less than differences that count and more than rounding.
    """
    order = jnp.argsort(scores, axis=1)
    ranked = jnp.take_along_axis(scores, order, axis=1)
    same = ranked[:, 1:] == ranked[:, :-1]
    above, below = (jnp.pad(same, ((0, 0), pad)) for pad in ((0, 1), (1, 0)))
    twice = jnp.take_along_axis(above | below, jnp.argsort(order, axis=1), axis=1)
    return jnp.where(twice, scores + most * lots, scores)
