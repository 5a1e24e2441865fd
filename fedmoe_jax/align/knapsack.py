"""The most valuable items that fit into the room and the slots of ONE client.

A knapsack with a second row, the number of slots: NP-hard where items differ in size,
which a compiled round cannot solve exactly. Items are taken greedily, by value and by
value per room, and each of the two is mended by the best exchanges; the better one
counts. Where all items are equally large it is exact.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array

# Share of the room by which sums of float32 sizes may exceed it; least gain in value.
ROUNDING = 1e-5


class Items(NamedTuple):
    """The items of ONE client, and its limits.

    Attributes:
      value: [E] float32, finite; an item below 0 is not worth its place.
      size: [E] float32 >= 0.
      room: [] float32, by which the sum of sizes is limited.
      slots: [] int32 >= 1, by which their number is limited.
      lots: [E] float32, which decide between items of equal value and size.
    """

    value: Array
    size: Array
    room: Array
    slots: Array
    lots: Array


def limit_size(items: Items) -> Array:
    """[] float32, what the sum of sizes may be, with its rounding."""
    return items.room + ROUNDING * jnp.abs(items.room)


def fits(taken: Array, items: Items) -> Array:
    """[...] bool, whether items [..., E] bool keep both limits."""
    size = jnp.where(taken, items.size, 0.0).sum(-1)
    return (size <= limit_size(items)) & (taken.sum(-1) <= items.slots)


def total(taken: Array, items: Items) -> Array:
    """[...] float32, the value of items [..., E] bool."""
    return jnp.where(taken, items.value, 0.0).sum(-1)


def take_greedily(rank: Array, items: Items) -> Array:
    """Items [E] bool: each by falling rank [E], if it is worth something and fits."""
    order = jnp.lexsort((items.lots, -rank))

    def take(number: Array, taken: Array) -> Array:
        more = taken.at[order[number]].set(True)
        worth = items.value[order[number]] >= 0
        return jnp.where(worth & fits(more, items), more, taken)

    nothing = jnp.zeros(len(rank), bool)
    return jax.lax.fori_loop(0, len(rank), take, nothing)


def exchange_best(taken: Array, items: Items) -> Array:
    """The items [E] bool after the exchange that gains most; as they are if none does.

    It drops one item, adds one, or swaps two: [E + 1, E + 1] pairs of what is left out
    and what is put in, of which the last is no item.
    """
    value, size = jnp.append(items.value, 0.0), jnp.append(items.size, 0.0)
    out, into = jnp.append(taken, True), jnp.append(~taken, True)
    real = jnp.arange(len(value)) < len(taken)
    less, more = lambda leaf: leaf[:, None], lambda leaf: leaf[None]
    left = limit_size(items) - jnp.where(taken, items.size, 0.0).sum()
    left = left + less(size) - more(size)
    number = taken.sum() - less(real).astype(int) + more(real)
    allowed = less(out) & more(into) & (left >= 0) & (number <= items.slots)
    gain = jnp.where(allowed, more(value) - less(value), -jnp.inf)
    best = jnp.unravel_index(gain.argmax(), gain.shape)
    other = taken.at[best[0]].set(False, mode="drop")
    other = other.at[best[1]].set(True, mode="drop")
    return jnp.where(gain.max() > ROUNDING, other, taken)


def mend(taken: Array, items: Items) -> Array:
    """The items [E] bool after so many of the best exchanges as there are items."""
    step = lambda _, taken: exchange_best(taken, items)
    return jax.lax.fori_loop(0, len(taken), step, taken)


def take_least(items: Items) -> Array:
    """One item [E] bool for a client of which nothing is worth it, or fits.

    The most valuable of those that fit alone; if none does, of the smallest ones.
    """
    alone = fits(jnp.eye(len(items.value), dtype=bool), items)
    smallest = items.size == items.size.min()
    value = jnp.where(jnp.where(alone.any(), alone, smallest), items.value, -jnp.inf)
    first = jnp.lexsort((items.lots, -value))[0]
    return jnp.arange(len(value)) == first


def fill_knapsack(items: Items) -> Array:
    """Items of the highest total value that keep both limits: [E] bool, one at least.

    An item is taken only where its value is 0 or more. Greedy by value and by value per
    size, each mended by exchanges (drop, add or swap one). There is no bound on what it
    misses; tests measure it against a mixed-integer program.
    """
    chex.assert_equal_shape([items.value, items.size, items.lots])
    density = items.value / jnp.maximum(items.size, jnp.finfo(jnp.float32).tiny)
    starts = jnp.stack([density, items.value])  # of equally good ones the smaller
    found = jax.vmap(lambda rank: mend(take_greedily(rank, items), items))(starts)
    best = found[total(found, items).argmax()]
    return jnp.where(best.any(), best, take_least(items))
