"""FLOPs that pruned units save, from the products that their leaves take part in."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from fedmoe_jax.base import Model, Route, Units
from fedmoe_jax.models.flops import shape_inputs
from fedmoe_jax.models.products import count_products
from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.pruning.units import flatten_leaves, of_part
from fedmoe_jax.tasks.batches import BatchShapes
from fedmoe_jax.types import Array, PyTree
from fedmoe_jax.world.costs import TRAINING_PASSES, Costs

Shares = tuple[tuple[tuple[str, ...], float], ...]  # by the path of a leaf


class Savings(NamedTuple):
    """What share of the FLOPs is in the products of each leaf that has units.

    Attributes:
      stem: of all that a model computes but its experts.
      experts: of ONE expert, the mean over MoE layers; the rest is what has no units,
        such as a frozen base below low-rank pairs.
      alone: of all that a model with one expert computes, by the leaves of that, where
        its FLOPs are not counted apart.
    """

    stem: Shares = ()
    experts: Shares = ()
    alone: Shares = ()

    @property
    def of_expert(self) -> float:
        """The share of an expert's FLOPs in products with what has units."""
        return sum(share for _, share in self.experts)


@functools.cache
def count_savings(
    model: Model, batch: BatchShapes, units: tuple[Units, ...], costs: Costs
) -> Savings:
    """The products of one example forward, through one expert in each layer.

    Args:
      model: as its FLOPs are counted.
      batch: the form of a batch.
      units: what can be pruned.
      costs: of the model.
    """
    if not units:
        return Savings()
    forward: Callable = lambda *inputs: model.apply(*inputs, Route(1), None)[0]
    found = count_products(forward, *shape_inputs(model, batch.of(1), 1))
    layers = layer_names(found["experts"])
    each = [flatten_leaves(found["experts"][name]) for name in layers]
    experts = {path: sum(layer[path] for layer in each) for path in each[0]}
    stem = flatten_leaves(found.get("stem", {}))
    share = functools.partial(_share, experts, of_part(units, "experts"))
    return Savings(
        _share(stem, of_part(units, "stem"), costs.shared_flops),
        share(costs.expert_flops) if costs.expert_flops else (),
        () if costs.expert_flops else share(costs.shared_flops),
    )


def _share(flops: Mapping, units: list[Units], whole: float) -> Shares:
    """FLOPs forward of the leaves that have units, over those of the part in training.

    No more than all, of which products alone may be more where XLA leaves some out.
    """
    paths = {path for each in units for path, _ in each.leaves}
    known = {path: TRAINING_PASSES * flops[path] for path in sorted(paths)}
    whole = max(whole, sum(known.values()))
    return tuple((path, value / whole) for path, value in known.items() if value)


def save_flops(masks: PyTree, units: list[Units], shares: Shares) -> Array:
    """The share of a part's FLOPs that masks leave out.

    A leaf between two layers has the products of what both keep.

    Args:
      masks: bool, [..., n] by the names of units.
      units: of ONE part, at least one.
      shares: of the part's leaves.

    Returns:
      [...] float32 in [0, 1].
    """
    left: dict[tuple[str, ...], Array] = {}
    for each in units:
        kept = masks[each.name].mean(axis=-1, dtype=jnp.float32)
        for path, _ in each.leaves:
            left[path] = left[path] * kept if path in left else kept
    none = jnp.zeros(masks[units[0].name].shape[:-1])
    return sum((share * (1 - left[path]) for path, share in shares), none)
