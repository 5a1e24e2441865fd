"""The local objective, and the feedback on each held expert, summed over batches."""

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.base import Links, Route, Routing, Scores
from fedmoe_jax.links import draw_training
from fedmoe_jax.models.routing import latency_loss
from fedmoe_jax.models.submodel import held_mask
from fedmoe_jax.moe_layers import map_layers
from fedmoe_jax.positions import mean_loss, weigh_routing
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, ClientInput, Feedback, Hyper, PyTree


class FeedbackSums(struct.PyTreeNode):
    """Running sums over the positions that one client has trained on in a round.

    A position is an image or a token; it counts with its weight.

    Attributes:
      gates: [G, K] float32, gate mass of every slot.
      score: [G, K] float32, gate mass times score.
      loss: [G, K] float32 nats, gate mass times loss.
      load: [G, K] float32, positions whose gates include the slot, of batches that
        train it.
      peak: [G, K] float32, the largest gate of each batch, summed.
      report: the strategy's report on each batch, summed; None without one.
      batches: [] float32.
      positions: [] float32, those whose weight is not 0.
      weight: [] float32, of all positions; None where every position counts alike.
      total_loss: [] float32 nats.
      total_score: [] float32.
    """

    gates: Array
    score: Array
    loss: Array
    load: Array
    peak: Array
    report: PyTree
    batches: Array
    positions: Array
    weight: Array | None
    total_loss: Array
    total_score: Array


def zero_sums(hyper: Hyper, program: Program) -> FeedbackSums:
    """Sums before any batch."""
    sizes, total = program.sizes, jnp.zeros(())
    slots = jnp.zeros((sizes.num_layers, sizes.max_held))
    report = shape_report(hyper, program)
    return FeedbackSums(
        *(slots, slots, slots, slots, slots),
        report=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), report),
        batches=total,
        positions=total,
        weight=None if program.scores.weight is None else total,
        total_loss=total,
        total_score=total,
    )


def make_report(
    routing: Routing, batch: PyTree, hyper: Hyper, program: Program
) -> PyTree:
    """The strategy's report on a batch, leaves [G, ...]; None without one."""
    report, num_layers = program.strategy.report, program.sizes.num_layers
    if report is None or routing.logits is None:
        return None
    report_layer = lambda layer: report(layer, batch, hyper)
    return map_layers(report_layer, num_layers, in_axes=0)(routing)


def shape_report(hyper: Hyper, program: Program) -> PyTree:
    """The shapes of `make_report`."""
    batch = program.batch.of(program.sizes.batch_size)
    make = lambda routing, batch: make_report(routing, batch, hyper, program)
    return jax.eval_shape(make, program.routing, batch)


def flatten_positions(scores: Scores) -> Scores:
    """Scores with leaves [P]: all positions of a batch in one row."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1), scores)


def sum_layer(gates: Array, trained: Array | None, scores: Scores) -> tuple[Array, ...]:
    """The sums of ONE layer over one batch, in the order of `FeedbackSums`.

    Args:
      gates: [P, K] float.
      trained: [K] bool, see `Routing`.
      scores: leaves [P].
    """
    if scores.weight is not None:
        counted = scores.weight[:, None] > 0
        gates = jnp.where(counted, gates, 0.0)
    mass = gates if scores.weight is None else gates * scores.weight[:, None]
    load = (gates > 0).sum(0).astype(jnp.float32)
    return (
        mass.sum(0),
        jnp.einsum("pk,p->k", mass, scores.score),
        jnp.einsum("pk,p->k", mass, scores.loss),
        load if trained is None else jnp.where(trained, load, 0.0),
        gates.max(0),
    )


def sum_batch(
    scores: Scores, routing: Routing, report: PyTree, num_layers: int
) -> FeedbackSums:
    """The sums over one batch.

    Args:
      scores: leaves [P].
      routing: of the batch.
      report: the strategy's, of this batch.
      num_layers: G.
    """
    over_layers = map_layers(sum_layer, num_layers, (0, 0, None), (0, 0, 0, 0, 0))
    weight = scores.weight
    count = float(scores.loss.size) if weight is None else (weight > 0).sum()
    total = lambda values: (values if weight is None else values * weight).sum()
    return FeedbackSums(
        *over_layers(routing.gates, routing.trained, scores),
        report=report,
        batches=jnp.ones(()),
        positions=jnp.asarray(count, jnp.float32),
        weight=None if weight is None else weight.sum(),
        total_loss=total(scores.loss),
        total_score=total(scores.score),
    )


def summarise_feedback(sums: FeedbackSums) -> Feedback:
    """Per-slot feedback, leaves [G, K], from the sums over a client's round.

    A position counts for an expert with its gate, so that with A = 1 `accuracy` is the
    accuracy on the positions routed to the expert, and experts that share every
    position can still differ.
    """
    share = 1.0 / jnp.maximum(sums.gates, 1e-6)
    in_layer = sums.gates.sum(axis=1, keepdims=True)
    return Feedback(
        accuracy=sums.score * share,
        loss=sums.loss * share,
        frequency=sums.gates / jnp.maximum(in_layer, 1e-6),
        load=sums.load,
        routed=sums.load / jnp.maximum(sums.positions, 1.0),
        peak=sums.peak / jnp.maximum(sums.batches, 1.0),
    )


def mean_report(sums: FeedbackSums) -> PyTree:
    """The strategy's report, mean over the batches; None without one."""
    batches = jnp.maximum(sums.batches, 1.0)
    return jax.tree.map(lambda leaf: leaf / batches, sums.report)


def sum_gate_losses(
    routing: Routing, inputs: ClientInput, hyper: Hyper, program: Program
) -> Array | float:
    """The strategy's loss of the gates, summed over the layers: [] nats."""
    sizes = program.sizes
    if routing.logits is None:
        return 0.0

    def layer_loss(
        logits: Array, weight: Array | None, held: Array, slot: Array, factor: Array
    ) -> Array:
        mask = held_mask(held, slot, sizes.num_experts)
        return program.strategy.gate_loss(logits, weight, mask, factor, hyper)

    over_layers = map_layers(layer_loss, sizes.num_layers, in_axes=0)
    slots = inputs.held, inputs.slot, inputs.calibration
    return over_layers(routing.logits, routing.weight, *slots).sum()


def expect_latency(routing: Routing, links: Links, inputs: ClientInput) -> Array:
    """The time of links, as gates choose, of all MoE layers together: [] deadlines."""
    assert routing.logits is not None
    num_layers, positions, num_experts = routing.logits.shape
    time = jnp.repeat(links.time, positions // len(links.time), axis=0)

    def of_layer(
        logits: Array, weight: Array | None, held: Array, slot: Array
    ) -> Array:
        mask = held_mask(held, slot, num_experts)
        return latency_loss(logits, weight, mask, time)

    over_layers = map_layers(of_layer, num_layers, in_axes=0)
    slots = inputs.held, inputs.slot
    return over_layers(routing.logits, routing.weight, *slots).sum()


def weigh_batch(batch: PyTree, program: Program) -> Array | None:
    """Weights [P] of a batch's positions, in which outputs play no part, or None."""
    if program.scores.weight is None:
        return None
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.outputs)
    weight = program.task.loss(blank, batch).weight
    assert weight is not None
    return weight.reshape(-1)


def make_route(
    inputs: ClientInput, batch: PyTree, hyper: Hyper, program: Program
) -> Route:
    """The routing of ONE client's batch in training, as the strategy has it."""
    strategy, priority = program.strategy, None
    if rate := strategy.expert_priority:
        weight = weigh_batch(batch, program)
        priority = lambda gates: rate(gates, weight, hyper)
    return Route(
        num_active=program.sizes.num_active,
        mix=strategy.mix,
        priority=priority,
        budget=inputs.budget,
        gating=strategy.gating,
        bias=inputs.bias,
    )


def local_loss(
    submodel: PyTree,
    frozen: PyTree,
    batch: PyTree,
    inputs: ClientInput,
    hyper: Hyper,
    key: Array,
    *,
    program: Program,
) -> tuple[Array, FeedbackSums]:
    """The objective of one local step: the task's loss and the losses of the gates.

    Args:
      submodel: params of one client, without the parts that are frozen.
      frozen: see `Federation.frozen`.
      batch: of the task, leaves [B, ...].
      inputs: the client's inputs.
      hyper: weights of the terms.
      key: of the step; dropout draws from it.
      program: the task, the model, and the strategy that shapes the objective.

    Returns:
      loss [], and the feedback of the batch.
    """
    route, slots = make_route(inputs, batch, hyper, program), (inputs.held, inputs.slot)
    if inputs.links is not None:
        links = draw_training(key, inputs.links, program.sizes.batch_size, hyper)
        route = route._replace(links=links)
    params = submodel | {part: frozen[part] for part in program.strategy.frozen}
    outputs, routing = program.model.apply(params, frozen, batch, *slots, route, key)
    scores = flatten_positions(program.task.loss(outputs, batch))
    routing = weigh_routing(routing, scores.weight)
    loss = mean_loss(scores) + sum_gate_losses(routing, inputs, hyper, program)
    if route.links is not None:
        loss += hyper.loss.latency * expect_latency(routing, route.links, inputs)
    report = make_report(routing, batch, hyper, program)
    return loss, sum_batch(scores, routing, report, program.sizes.num_layers)
