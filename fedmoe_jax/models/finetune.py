"""Full fine-tuning: a pretrained decoder, all of whose weights are trained.

Params are differences from the base, which stays in `frozen["base"]` as it is for
`lora`: every weight is base + difference, and all differences start as 0. So the base
travels once, as there, differences are averaged as weights would be, and weight decay
and proximal terms pull towards the base. Of a base with mixtures each expert has
differences of its own; of a dense one E experts start as copies of its hidden layer
(sparse upcycling, arXiv 2212.05055), with the gate of `lora`.
"""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import BASE, Model, Route, Routing
from fedmoe_jax.models import lora
from fedmoe_jax.models.lora import Shape
from fedmoe_jax.types import Array, PyTree

ROUTER = "router"  # its differences are those of the gate


def split_base(base: PyTree, shape: Shape) -> tuple[PyTree, PyTree]:
    """Of the base's leaves those that all clients train, and those of MoE layers.

    Args:
      base: the tree of the decoder's weights, or of their shapes.
      shape: of the model.

    Returns:
      The stem, and by the name of its block each MoE layer's hidden layer or experts.
    """
    part = "hidden" if shape.arch.mixture is None else "experts"
    stem, experts = dict(base), {}
    for name in lora.list_layers(shape.arch):
        experts[name] = base[name][part]
        rest = base[name].items()
        stem[name] = {key: each for key, each in rest if key not in (part, ROUTER)}
    return stem, experts


def init(key: Array, shape: Shape) -> tuple[PyTree, PyTree]:
    """`Model.init`; only gates are drawn."""
    stem, experts = split_base(lora.shape_base(shape.arch, "float32"), shape)
    copies = () if shape.arch.mixture else (shape.num_experts,)
    zeros = lambda *axes: lambda leaf: jnp.zeros((*axes, *leaf.shape))
    keys = jax.random.split(key, len(experts))
    return {
        "stem": jax.tree.map(zeros(), stem),
        "experts": jax.tree.map(zeros(*copies), experts),
        "gate": {
            name: lora.init_gate(own, shape)
            for own, name in zip(keys, experts, strict=True)
        },
        "head": {},
    }, {}


def add(base: PyTree, differences: PyTree) -> PyTree:
    """The base with the differences of the leaves that have some."""
    if not isinstance(base, dict):
        return base + differences
    return {
        name: add(each, differences[name]) if name in differences else each
        for name, each in base.items()
    }


def apply(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    held: Array,
    slot: Array,
    route: Route,
    key: Array | None,
    *,
    shape: Shape,
) -> tuple[Array, Routing]:
    """`Model.apply`, see `lora.apply`."""
    weights = add(frozen[BASE], params["stem"])
    params, frozen = params | {"stem": {}}, frozen | {BASE: weights}
    return lora.apply(params, frozen, batch, held, slot, route, key, shape=shape)


@functools.cache
def build_model(shape: Shape) -> Model:
    """The model of these sizes; equal sizes give the same functions."""
    return Model(
        init=functools.partial(init, shape=shape),
        apply=functools.partial(apply, shape=shape),
        base=lora.make_base(shape),
    )


def build(config: ConfigDict, batch: PyTree, num_outputs: int, platform: str) -> Model:
    """The model of a config; equal configs give the same functions.

    Args:
      config: gives `num_experts`, `gate.input` and the group `model`.
      batch: shapes of a batch with `tokens` [B, P].
      num_outputs: the vocabulary of the data, at most that of the base.
      platform: that it will run on, not read.

    Raises:
      UserError: see `lora.build`.
    """
    return build_model(lora.make_shape(config, batch, num_outputs, rank=0))
