"""FLOPs of the products that each leaf of the params is a factor of.

What pruning saves depends on where a leaf is used: an entry of a convolution's kernel
takes part at every place of the image, one of the layer behind it once. So the jaxpr of
a forward pass is searched for products of a leaf, or of several side by side.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from fedmoe_jax.base import Model, Route
from fedmoe_jax.models.flops import shape_inputs, shape_params
from fedmoe_jax.tasks.batches import BatchShapes
from fedmoe_jax.types import PyTree

Origin = frozenset[int]  # the leaves that a value is made of, and of nothing else
NONE: Origin = frozenset()

# Of these the values of a leaf come out as they are, in another form.
FORMS = {
    *("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze"),
    *("expand_dims", "copy", "copy_p", "pad", "rev", "slice", "dynamic_slice"),
    *("mul", "div", "neg"),  # by a number
    *("concatenate", "stack", "split", "select_n", "optimization_barrier"),
}


def count_products(function: Callable, params: PyTree, *arguments: PyTree) -> PyTree:
    """FLOPs of a function's products by the leaf of `params` that they multiply with.

    Products of activations with each other, sums and what is done entry by entry are
    not among them, nor what is in branches and in loops of unknown length. FLOPs of a
    product of several leaves are shared evenly.

    Args:
      function: (params, *arguments) -> anything.
      params: arrays or their shapes.
      arguments: likewise.

    Returns:
      Floats in the form of `params`.
    """
    leaves, form = jax.tree.flatten(params)
    closed = jax.make_jaxpr(function)(params, *arguments)
    found = [0.0] * len(leaves)
    inputs = [frozenset({i}) for i in range(len(leaves))]
    inputs += [NONE] * (len(closed.jaxpr.invars) - len(leaves))
    _walk(closed.jaxpr, inputs, 1, found)
    return jax.tree.unflatten(form, found)


def _walk(
    jaxpr: Any, inputs: Sequence[Origin], times: int, found: list[float]
) -> list[Origin]:
    """Adds the FLOPs of a jaxpr that runs so many times; the origin of its outputs."""
    origin = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda var: NONE if isinstance(var, Literal) else origin.get(var, NONE)
    for equation in jaxpr.eqns:
        of = [read(var) for var in equation.invars]
        origin |= zip(
            equation.outvars, _follow(equation, of, times, found), strict=True
        )
    return [read(var) for var in jaxpr.outvars]


def _follow(
    equation: Any, inputs: list[Origin], times: int, found: list[float]
) -> list[Origin]:
    """Adds the FLOPs of one equation; the origin of its outputs."""
    params, name = equation.params, equation.primitive.name
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None:
        times *= params["length"] if name == "scan" else 1
        return _walk(getattr(inner, "jaxpr", inner), inputs, times, found)
    if name in PRODUCTS:
        leaves = inputs[0] | inputs[1]
        for leaf in leaves:
            found[leaf] += times * PRODUCTS[name](equation) / len(leaves)
    if name == "gather":  # whichever rows
        return [inputs[0]]
    whole = name in FORMS and all(
        of or not var.aval.size > 1
        for of, var in zip(inputs, equation.invars, strict=True)
    )
    made = frozenset().union(*inputs) if whole else NONE
    return [made] * len(equation.outvars)


def count_dot(equation: Any) -> float:
    """FLOPs of `dot_general`: two for each pair of numbers that meet."""
    (left, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in left)


def count_convolution(equation: Any) -> float:
    """FLOPs of `conv_general_dilated`: those with what is padding are left out."""
    params = equation.params
    numbers, (left, right) = params["dimension_numbers"], equation.invars[:2]
    out = equation.outvars[0].aval.shape
    meet = 1
    for i, (low, _) in enumerate(params["padding"]):
        image, taps = left.aval.shape[numbers.lhs_spec[2 + i]], numbers.rhs_spec[2 + i]
        places = params["window_strides"][i] * np.arange(out[numbers.out_spec[2 + i]])
        offset = params["rhs_dilation"][i] * np.arange(right.aval.shape[taps])
        place = places[:, None] + offset[None] - low
        spacing = params["lhs_dilation"][i]
        inside = (place >= 0) & (place <= spacing * (image - 1))
        meet *= int((inside & (place % spacing == 0)).sum())
    inputs = right.aval.shape[numbers.rhs_spec[1]]
    return 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * inputs * meet


@functools.cache
def count_fixed_products(model: Model, batch: BatchShapes) -> tuple[float, float]:
    """FLOPs of one example forward in products with weights that a model keeps fixed.

    Returns:
      Those of what all clients share, and those of one expert in every MoE layer; all
      shared where there is one expert, as in `flops.count_forward_flops`.
    """
    params, frozen = shape_params(model)
    if not frozen:
        return 0.0, 0.0

    def count(held: int) -> float:
        own, frozen, *rest = shape_inputs(model, batch.of(1), held)
        forward = lambda frozen, own, *rest: model.apply(
            own, frozen, *rest, Route(held), None
        )
        found = count_products(forward, frozen, own, *rest)
        return float(sum(jax.tree.leaves(found)))

    one = count(1)
    if jax.tree.leaves(params["experts"])[0].shape[0] == 1:
        return one, 0.0
    expert = max(count(2) - one, 0.0)
    return one - expert, expert


PRODUCTS = {"dot_general": count_dot, "conv_general_dilated": count_convolution}
