"""The axis G: functions of ONE MoE layer, mapped over the layers of a model.

Strategies, scores and weights are written for one layer. `map_layers` is the one place
where they meet several: it vmaps them over G, and where G is 1 it calls them as they
are, so that a model with one MoE layer costs nothing for the axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, PyTree

LAYERED = ("gate", "experts")  # parts with a subtree and rows [E] per MoE layer
LAYER = 1300  # purpose, plus the layer's number folded into a key; layer 0 has the key


def map_layers(
    function: Callable[..., PyTree],
    num_layers: int,
    in_axes: PyTree,
    out_axes: PyTree = 0,
) -> Callable[..., PyTree]:
    """`function` of ONE MoE layer over the axis G of its arguments and results.

    Args:
      function: of one layer.
      num_layers: G.
      in_axes: where G is in each argument, as for `jax.vmap`; None where it is not.
      out_axes: where G goes in each result, likewise, never None.
    """
    if num_layers > 1:
        return jax.vmap(function, in_axes, out_axes)
    no_axis = lambda axis: axis is None

    def take(axis: int | None, tree: PyTree) -> PyTree:
        if axis is None:
            return tree
        return jax.tree.map(lambda leaf: jnp.squeeze(leaf, axis), tree)

    def only_layer(*arguments: PyTree) -> PyTree:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(arguments)
        single = jax.tree.map(take, axes, arguments, is_leaf=no_axis)
        expand = lambda axis, tree: jax.tree.map(
            lambda leaf: jnp.expand_dims(leaf, axis), tree
        )
        return jax.tree.map(expand, out_axes, function(*single))

    return only_layer


def layer_keys(key: Array, num_layers: int) -> Array:
    """A key for each layer, [G]; the first is `key` itself."""
    others = [jax.random.fold_in(key, LAYER + layer) for layer in range(1, num_layers)]
    return jnp.stack([key, *others])


def count_experts(part: dict[str, PyTree]) -> int:
    """E, the rows of every leaf of a part that has rows."""
    return jax.tree.leaves(part)[0].shape[0]


def layer_names(tree: dict[str, PyTree]) -> list[str]:
    """The names of the G subtrees of a part of the params, in the order of G."""
    return sorted(tree)


def map_rows(
    function: Callable[..., Array], weight: dict[str, Array], *trees: PyTree
) -> PyTree:
    """`function(weight [] or [E], leaf, ...)` of all leaves of pytrees like params."""

    def map_part(part: str) -> PyTree:
        parts = [tree[part] for tree in trees]
        if part not in LAYERED:
            return jax.tree.map(functools.partial(function, weight[part]), *parts)
        return {
            name: jax.tree.map(
                functools.partial(function, weight[part][layer]),
                *(tree[name] for tree in parts),
            )
            for layer, name in enumerate(layer_names(parts[0]))
        }

    return {part: map_part(part) for part in weight}
