"""Pruned units in the params: masks over units, spread over the leaves that have them.

Masks and whatever else has a number for each unit are dicts by the name of the units:
[n] of the stem's, [G, K, n] of the experts that ONE client holds. A unit is pruned by
multiplying its entries in all leaves by 0 (structured pruning), so that shapes stay
static; bytes and FLOPs are counted from the masks.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from fedmoe_jax.base import Units
from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.types import Array, PyTree


def flatten_leaves(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dicts by their paths."""
    return dict(traverse_util.flatten_dict(tree))


def of_part(units: Iterable[Units], part: str) -> list[Units]:
    """The units of `experts` or of the `stem`."""
    return [each for each in units if each.part == part]


def spread(values: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Values [..., n] of units as a factor of a leaf that has them.

    Args:
      values: float32; their leading axes are those of the leaf.
      shape: of the leaf.
      axis: of the units, behind the leading axes.

    Returns:
      As many axes as the leaf, of length 1 but for the leading ones and that of the
      units.
    """
    leading = values.ndim - 1
    place = leading + axis
    repeats = shape[place] // values.shape[-1]
    tiled = jnp.tile(values, (1,) * leading + (repeats,))
    length = [1] * len(shape)
    length[:leading], length[place] = values.shape[:-1], shape[place]
    return tiled.reshape(length)


def gather(leaf: Array, count: int, leading: int, axis: int) -> Array:
    """The sum of a leaf's entries over each of `count` units: [..., n], the inverse."""
    place = leading + axis
    moved = jnp.moveaxis(leaf, place, -1)
    units = moved.reshape(*moved.shape[:-1], -1, count)
    return units.sum(axis=tuple(range(leading, units.ndim - 1)))


def _keep_tree(
    masks: dict[str, Array], tree: PyTree, units: list[Units], leading: int
) -> PyTree:
    """The factor of every leaf of ONE subtree, see `keep_params`."""
    leaves = flatten_leaves(tree)
    keep = {
        path: jnp.ones(leaf.shape[:leading] + (1,) * (leaf.ndim - leading))
        for path, leaf in leaves.items()
    }
    for each in units:
        for path, axis in each.leaves:
            factor = spread(masks[each.name], leaves[path].shape, axis)
            keep[path] = keep[path] * factor
    return traverse_util.unflatten_dict(keep)


def keep_params(
    masks: dict[str, Array], submodel: PyTree, units: tuple[Units, ...]
) -> PyTree:
    """The factors of ONE client's params, broadcastable: 1, and 0 of what is pruned.

    Args:
      masks: see the module.
      submodel: of the client; experts' leaves are [K, ...].
      units: of the model.

    Returns:
      Of the parts that have units alone.
    """
    keep = {}
    stem, experts = of_part(units, "stem"), of_part(units, "experts")
    if stem and "stem" in submodel:
        keep["stem"] = _keep_tree(masks, submodel["stem"], stem, 0)
    if experts:
        keep["experts"] = {
            name: _keep_tree(
                {each.name: masks[each.name][g] for each in experts}, tree, experts, 1
            )
            for g, (name, tree) in enumerate(sorted(submodel["experts"].items()))
        }
    return keep


def multiply_parts(params: PyTree, keep: PyTree) -> PyTree:
    """Params, or what is like them, with their factors, see `keep_params`."""
    kept = {
        part: jax.tree.map(jnp.multiply, params[part], factors)
        for part, factors in keep.items()
    }
    return params | kept


def _sum_tree(tree: PyTree, units: list[Units], leading: int) -> dict[str, Array]:
    leaves = flatten_leaves(tree)

    def total(each: Units) -> Array:
        found = [
            gather(leaves[path], each.count, leading, axis)
            for path, axis in each.leaves
        ]
        return jnp.stack(found).sum(axis=0)

    return {each.name: total(each) for each in units}


def sum_units(submodel: PyTree, units: tuple[Units, ...]) -> dict[str, Array]:
    """The sum of the entries of every unit, of ONE client's sub-model or the like.

    Returns:
      [n] of the stem's units, [G, K, n] of the experts'.
    """
    found = {}
    stem, experts = of_part(units, "stem"), of_part(units, "experts")
    if stem:
        found |= _sum_tree(submodel["stem"], stem, 0)
    if experts:
        layers = [
            _sum_tree(submodel["experts"][name], experts, 1)
            for name in layer_names(submodel["experts"])
        ]
        found |= {
            each.name: jnp.stack([layer[each.name] for layer in layers])
            for each in experts
        }
    return found


def zero_units(submodel: PyTree, units: tuple[Units, ...]) -> dict[str, Array]:
    """0 for every unit, shaped as by `sum_units`."""
    found = jax.eval_shape(lambda tree: sum_units(tree, units), submodel)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)


def _count_own(tree: PyTree, units: list[Units], leading: int) -> list[Units]:
    """The units with their entries; a leaf counts with the last units that it has.

    A leaf between two layers is as large as the product of what both keep, so that
    counting it with the outputs of its layer alone is never too little.
    """
    leaves = flatten_leaves(tree)
    owner = {path: each for each in units for path, _ in each.leaves}

    def count(each: Units) -> float:
        own = [leaves[path] for path, units in owner.items() if units is each]
        return sum(math.prod(leaf.shape[leading:]) for leaf in own) / each.count

    return [each._replace(entries=count(each)) for each in units]


def count_entries(
    params: PyTree, units: tuple[Units, ...]
) -> tuple[tuple[Units, ...], float]:
    """The units with their entries, and those of ONE expert that are in no unit.

    Args:
      params: the server's, arrays or their shapes; experts' leaves are [E, ...]. All
        MoE layers have experts of equal shapes.
      units: of the model.
    """
    stem, experts = of_part(units, "stem"), of_part(units, "experts")
    layer = next(iter(params["experts"].values()))
    stem = _count_own(params["stem"], stem, 0) if stem else []
    experts = _count_own(layer, experts, 1)
    whole = sum(math.prod(leaf.shape[1:]) for leaf in flatten_leaves(layer).values())
    rest = whole - sum(each.count * each.entries for each in experts)
    return (*stem, *experts), rest if experts else 0.0


def share_experts(
    masks: dict[str, Array], units: tuple[Units, ...], rest: float
) -> Array:
    """The share of each held expert's entries that ONE client keeps: [G, K].

    Args:
      masks: see the module.
      units: with their entries.
      rest: entries of ONE expert that are in no unit.
    """
    experts = of_part(units, "experts")
    kept, whole = jnp.asarray(rest), rest
    for each in experts:
        kept = kept + each.entries * masks[each.name].sum(-1)
        whole += each.entries * each.count
    return kept / whole


def zero_keep(params: PyTree, units: tuple[Units, ...]) -> PyTree:
    """0 for every factor of the server's params, see `keep_params`; {} without units.

    Experts' leaves are [E, ...].
    """
    if not units:
        return {}
    none = zero_units(params, units)
    factors = jax.eval_shape(lambda: keep_params(none, params, units))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), factors)
