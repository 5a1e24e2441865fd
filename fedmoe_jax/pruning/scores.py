"""The order in which the units of ONE layer are kept: larger scores first.

A layer is the stem's units of one kind, or those of one expert. Scores in (0, 1] are
comparable between layers, so that one threshold for each client cuts all of them, and
the ratio that each layer keeps comes out by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fedmoe_jax.types import Array

DEVIATION = 1.4826  # of a normal, over its median absolute deviation
SPLIT = 1e-4  # by how much lots part equal importances, as a share of them
LEAST = 1e-6  # of the largest importance, in place of 0


class Layer(NamedTuple):
    """The knowledge about the units of ONE layer, from which they are scored.

    Attributes:
      importance: [n] float32 >= 0, as clients have measured it; below 0 where none has.
      magnitude: [n] float32 >= 0, the norm of each unit's weights.
      lot: [n] float32 in [0, 1), of one client.
      gap: [] float32 >= 0, see `pruning.gap`.
    """

    importance: Array
    magnitude: Array
    lot: Array
    gap: Array


def rank(values: Array) -> Array:
    """Places [n] of the values [n], 0 for the largest, of equals for the first."""
    return jnp.argsort(jnp.argsort(-values))


def fill_unknown(importance: Array) -> Array:
    """Importance [n] > 0, with the mean of what is known for what is not.

    What is measured as 0 comes last; where all of it is, all units are alike.
    """
    known = importance >= 0
    value = jnp.where(known, importance, 0.0)
    mean = value.sum() / jnp.maximum(known.sum(), 1)
    filled = jnp.where(known, value, mean)
    most = filled.max()
    return jnp.where(most > 0, jnp.maximum(filled, LEAST * most), 1.0)


def lamp(importance: Array) -> Array:
    """`I_j^2 / sum of I_v^2 over v with I_v >= I_j` in (0, 1] (arXiv 2010.07611).

    Published for single weights by their magnitude; units by their importance are this
    project's choice. The best unit of a layer has 1, so that no layer is cut off.

    Args:
      importance: [n] float32 > 0, distinct.
    """
    square = (importance / importance.max()) ** 2
    order = jnp.argsort(-square)
    ranked = square[order]
    scores = ranked / jnp.cumsum(ranked)
    return jnp.zeros_like(scores).at[order].set(scores)


def count_before_gap(importance: Array, gap: Array) -> Array:
    """Units [] before the first gap between ranked importances that is a large one.

    Large is `median + gap * 1.4826 * MAD` of all gaps and more (the rule of COSMIC-FL's
    abstract, arXiv 2609.31932; its form here is this project's). All n without any. Of
    importances with a long tail the first large gap is near the top, and little changes
    beside `by_lamp`.
    """
    ranked = -jnp.sort(-importance)
    gaps = ranked[:-1] - ranked[1:]
    middle = jnp.median(gaps)
    spread = jnp.median(jnp.abs(gaps - middle))
    large = gaps > middle + gap * DEVIATION * spread
    return jnp.where(large.any(), large.argmax() + 1, len(importance))


def by_lamp(layer: Layer) -> Array:
    """Taylor importance, comparable between layers by `lamp`."""
    return lamp(fill_unknown(layer.importance) * (1 + SPLIT * layer.lot))


def by_gap(layer: Layer) -> Array:
    """As `by_lamp`, and what is behind a layer's first large gap comes last."""
    importance = fill_unknown(layer.importance) * (1 + SPLIT * layer.lot)
    before = rank(importance) < count_before_gap(importance, layer.gap)
    return (lamp(importance) + before) / 2


def by_magnitude(layer: Layer) -> Array:
    """The norm of the weights, comparable between layers by `lamp`."""
    return lamp((layer.magnitude + 1e-12) * (1 + SPLIT * layer.lot))


def by_share(order: Array) -> Array:
    """Scores that keep the same share of every layer, the largest of `order` [n]."""
    return 1 - rank(order) / len(order)


def uniform(layer: Layer) -> Array:
    """The same share of every layer, by Taylor importance."""
    return by_share(fill_unknown(layer.importance) * (1 + SPLIT * layer.lot))


def at_random(layer: Layer) -> Array:
    """The same share of every layer, drawn for each client and the whole run."""
    return by_share(layer.lot)


def by_place(layer: Layer) -> Array:
    """The same share of every layer, its first units (HeteroFL, arXiv 2010.01264)."""
    return by_share(-jnp.arange(len(layer.lot)))


SCORES: dict[str, Callable[[Layer], Array]] = {
    "lamp": by_lamp,
    "gap": by_gap,
    "magnitude": by_magnitude,
    "uniform": uniform,
    "random": at_random,
    "width": by_place,
}
MEASURED = ("lamp", "gap", "uniform")  # clients measure the importance while they train
NONE = "none"
KINDS = (NONE, *SCORES)
