"""The units that ONE client keeps, within the bytes that it has room for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.pruning.scores import rank
from fedmoe_jax.types import Array

ROUNDING = 1e-5  # share by which sums of costs may be off
GOLDEN = 0.6180339887  # spreads the clients' places evenly, however many there are


class Group(NamedTuple):
    """The units of one kind in all layers that have them, of ONE client.

    Attributes:
      score: [r, n] float32 in (0, 1], rows are layers, larger is kept first.
      valid: [r] bool, whether the client has the layer at all.
      cost: [] float32 > 0, bytes of one unit.
    """

    score: Array
    valid: Array
    cost: Array


def keep_best(score: Array, floor: Array) -> Array:
    """[n] bool, the best units of ONE layer that every client keeps, one at least.

    Args:
      score: [n].
      floor: [] in (0, 1], their share, rounded up.
    """
    least = jnp.maximum(jnp.ceil(floor * len(score) - ROUNDING), 1)
    return rank(score) < least


def rotate(count: int, share: Array, client: Array, round: Array) -> Array:
    """[n] bool, the units whose turn it is, whatever their score.

    A window over a layer's units that moves on by its length in every round, and starts
    at another place for every client, so that units which all clients would prune are
    still trained by a share of the holders in each round, and come back (regrowth).
    Windows instead of regrowth by gradients, which would take a backward pass through
    what is pruned, are this project's choice.

    Args:
      count: n.
      share: [] in [0, 1), length of the window.
      client: [] int32, id.
      round: [] int32.
    """
    start = (client * GOLDEN + round * share) % 1.0
    place = (jnp.arange(count) / count - start) % 1.0
    return place < share


def rank_units(
    groups: list[Group],
    *,
    floor: Array,
    rotation: Array,
    client: Array,
    round: Array,
) -> tuple[Array, Array, Array]:
    """All units of ONE client in one row: priority, cost, and which are kept anyway."""
    priority, cost, always = [], [], []
    for group in groups:
        count = group.score.shape[1]
        turn = rotate(count, rotation, client, round)[None]
        best = jax.vmap(keep_best, (0, None))(group.score, floor)
        best &= group.valid[:, None]
        order = group.score + turn + 2.0 * best
        priority.append(jnp.where(group.valid[:, None], order, -1.0).ravel())
        cost.append(
            jnp.where(group.valid[:, None], group.cost, 0.0)
            .repeat(count, axis=1)
            .ravel()
        )
        always.append(best.ravel())
    return jnp.concatenate(priority), jnp.concatenate(cost), jnp.concatenate(always)


def choose_units(
    groups: list[Group],
    room: Array,
    *,
    floor: Array,
    rotation: Array,
    client: Array,
    round: Array,
) -> list[Array]:
    """The units that ONE client keeps: the first in the order of their scores that fit.

    One threshold cuts all layers. Before it come the floor of every layer and the
    units whose turn it is; the floor is kept also where it does not fit.

    Args:
      groups: all units of the client.
      room: [] float32, bytes for them.
      floor: see `keep_best`.
      rotation: see `rotate`.
      client: [] int32, id.
      round: [] int32.

    Returns:
      For each of the groups [r, n] bool; all False in layers that are not valid.
    """
    priority, cost, always = rank_units(
        groups, floor=floor, rotation=rotation, client=client, round=round
    )
    order = jnp.argsort(-priority, stable=True)
    total = jnp.cumsum(cost[order])
    fits = jnp.zeros_like(always).at[order].set(total <= (1 + ROUNDING) * room)
    kept = (fits | always) & (priority >= 0)
    ends, masks, start = [group.score.size for group in groups], [], 0
    for group, size in zip(groups, ends, strict=True):
        masks.append(kept[start : start + size].reshape(group.score.shape))
        start += size
    return masks
