"""Shapes, FLOPs and activation bytes of a model; nothing of it is ever run."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from fedmoe_jax.base import (
    BASE,
    SHARED,
    SHARED_EXPERT,
    Model,
    Route,
    Routing,
    Scores,
    Task,
)
from fedmoe_jax.models.one_layer import apply_experts, run_shared
from fedmoe_jax.models.routing import gate_logits
from fedmoe_jax.positions import weigh_routing
from fedmoe_jax.tasks.batches import BatchShapes
from fedmoe_jax.types import PyTree, Sizes

MARK = 9973  # a prime that no axis of the params has, so it marks activations


def shape_params(model: Model) -> tuple[PyTree, PyTree]:
    """Shapes of the params and of what is frozen, with the base's weights."""
    params, frozen = jax.eval_shape(model.init, jax.random.key(0))
    return params, frozen | shape_base(model)


def shape_base(model: Model) -> PyTree:
    """Shapes of pretrained weights, as `Federation.base` has them."""
    return {} if model.base is None else {BASE: model.base.shapes()}


def hold(experts: PyTree, count: int) -> PyTree:
    """Shapes of `count` experts, leaves [count, ...], from those of all, [E, ...]."""
    resize = lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
    return jax.tree.map(resize, experts)


def shape_inputs(model: Model, batch: PyTree, count: int) -> tuple[PyTree, ...]:
    """Shapes of what `Model.apply` reads of a client with `count` experts a layer."""
    params, frozen = shape_params(model)
    slots = len(params["gate"]), count
    held, slot = (jax.ShapeDtypeStruct(slots, kind) for kind in (jnp.int32, bool))
    submodel = params | {"experts": hold(params["experts"], count)}
    return submodel, frozen, batch, held, slot


@functools.cache
def trace_model(
    model: Model, task: Task, batch: BatchShapes, sizes: Sizes
) -> tuple[PyTree, Scores, Routing]:
    """Shapes of the outputs, their scores and the routing of one local batch."""
    route = Route(sizes.num_active)

    def forward(*inputs: PyTree) -> tuple[PyTree, Scores, Routing]:
        outputs, routing = model.apply(*inputs, route, None)
        scores = task.loss(outputs, inputs[2])
        return outputs, scores, weigh_routing(routing, scores.weight)

    rows = batch.of(sizes.batch_size)
    return jax.eval_shape(forward, *shape_inputs(model, rows, sizes.max_held))


def unroll_loops(jaxpr: Any) -> Any:
    """The jaxpr with the body of every scan as often as it runs."""
    plain = getattr(jaxpr, "jaxpr", jaxpr)

    def unroll(equation: Any) -> Any:
        params = {
            name: unroll_loops(value) if hasattr(value, "eqns") else value
            for name, value in equation.params.items()
        }
        if equation.primitive.name == "scan":
            params["unroll"] = max(params["length"], 1)
        return equation.replace(params=params)

    unrolled = plain.replace(eqns=[unroll(equation) for equation in plain.eqns])
    return unrolled if plain is jaxpr else jaxpr.replace(jaxpr=unrolled)


def count_flops(function: Callable, *arguments: PyTree) -> float:
    """FLOPs of a function of such shapes, as XLA counts them before compiling.

    XLA counts the body of a loop once, so loops of a known length are unrolled.
    """
    host = jax.local_devices(backend="cpu")[0]  # others cannot count before compiling
    with jax.default_device(host):
        unrolled = jaxpr_as_fun(unroll_loops(jax.make_jaxpr(function)(*arguments)))
        lowered = jax.jit(unrolled).lower(*jax.tree.leaves(arguments))
        analysis = lowered.cost_analysis()
    assert analysis is not None
    return float(analysis.get("flops", 0.0))  # a flat stem has none


@functools.cache
def count_forward_flops(model: Model, batch: BatchShapes) -> dict[str, float]:
    """FLOPs of one example forward, as XLA counts them.

    Returns:
      `experts`, of one expert in every MoE layer, and the rest: `stem`, `gate` and
      `head`, and `shared_expert` where there is one; or `shared` where the model does
      not name its parts. A model with one expert and no parts is all `shared`.
    """
    if model.parts is None:
        return _count_whole(model, batch)
    parts, example = model.parts, batch.of(1)
    params, _ = shape_params(model)
    features = jax.eval_shape(parts.stem, params["stem"], example, None)
    (gate,), (experts,) = params["gate"].values(), params["experts"].values()
    expert = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), experts
    )
    output = jax.eval_shape(parts.expert, expert, features, None)
    flops = {
        "stem": count_flops(parts.stem, params["stem"], example, None),
        "gate": count_flops(gate_logits, gate, features),
        "head": count_flops(parts.head, params["head"], output),
        "experts": count_flops(parts.expert, expert, features, None),
    }
    if parts.shared is not None:
        own = params["stem"][SHARED], features, None
        flops[SHARED_EXPERT] = count_flops(parts.shared, *own)
    return flops


def _count_whole(model: Model, batch: BatchShapes) -> dict[str, float]:
    """One expert is the difference that a second one makes, where all are active."""

    def count(held: int) -> float:
        forward = lambda *inputs: model.apply(*inputs, Route(held), None)[0]
        return count_flops(forward, *shape_inputs(model, batch.of(1), held))

    params, _ = shape_params(model)
    one = count(1)
    expert = 0.0
    if jax.tree.leaves(params["experts"])[0].shape[0] > 1:
        expert = max(count(2) - one, 0.0)
    return {"shared": one - expert, "experts": expert}


@functools.cache
def count_activation_bytes(model: Model, batch: BatchShapes, experts: int) -> float:
    """Bytes of all intermediate values of one example, forward, through n experts."""
    rows, parts = batch.of(MARK), model.parts
    inputs = shape_inputs(model, rows, experts)
    if parts is None:
        whole = lambda *inputs: model.apply(*inputs, Route(experts), None)
        return _sum_marked(whole, *inputs)
    params = inputs[0]
    (held,) = params["experts"].values()

    def forward(stem: PyTree, held: PyTree, rows: PyTree) -> PyTree:
        features = parts.stem(stem, rows, None)
        shared = run_shared(parts, stem, features, None)
        return apply_experts(parts, held, features, None), shared

    return _sum_marked(forward, params["stem"], held, rows)


def _sum_marked(function: Callable, *arguments: PyTree) -> float:
    """Bytes of the values with the marked axis, of one row of it."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    values = [var.aval for eqn in _list_equations(jaxpr) for var in eqn.outvars]
    marked = [value for value in values if any(map(is_marked, value.shape))]
    return float(sum(value.size * value.dtype.itemsize for value in marked)) / MARK


def is_marked(size: int) -> bool:
    """Whether an axis of the marked batch is among those that make up this one."""
    return size > 0 and size % MARK == 0


def _list_equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and those inside functions with own gradients.

    What a backward pass computes again counts like what is kept: it is there, too.
    The body of a loop counts as often as it runs.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner, times = equation.params.get("call_jaxpr"), 1
        if equation.primitive.name == "scan":
            inner, times = equation.params["jaxpr"], equation.params["length"]
        if (
            "checkpoint" in equation.primitive.name
            or "remat" in equation.primitive.name
        ):
            inner = equation.params["jaxpr"]
        if inner is None:
            yield equation
        else:
            for _ in range(times):
                yield from _list_equations(inner)
