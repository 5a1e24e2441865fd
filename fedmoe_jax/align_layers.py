"""Steps 3 and 6 of a round over the MoE layers of the model."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.align.affinity import bias_slots
from fedmoe_jax.align.learn import RESET, count_load, learn
from fedmoe_jax.align.queues import TierPressure, lift_tiers
from fedmoe_jax.forms import check_form, check_type
from fedmoe_jax.moe_layers import layer_keys, map_layers
from fedmoe_jax.privacy.request import request
from fedmoe_jax.program import Program
from fedmoe_jax.reply import Reply
from fedmoe_jax.types import (
    AlignState,
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    PyTree,
    SimState,
    make_keys,
)

# The place of G in the leaves; None where all layers share the leaf.
_EVIDENCE: dict[str, Any] = dict(
    round=None,
    client=None,
    fitness=1,
    usage=0,
    capacity=None,
    size=None,
    load=None,
    held=1,
    times_held=1,
    state=0,
    room=None,
    times=None,
)
_ALIGN: dict[str, Any] = dict(
    fitness=1, usage=0, held=1, times_held=1, strategy=0, detector=0
)
EVIDENCE, ALIGN = Evidence(**_EVIDENCE), AlignState(**_ALIGN)


def assign(
    evidence: Evidence,
    hyper: Hyper,
    program: Program,
    key: Array,
    pressure: TierPressure | None = None,
) -> Assignment:
    """The strategy's decision for the cohort, leaves [C, G, ...].

    With its bias, and with what clients ask for where that is randomised. Tiers under
    `pressure`, leaves [G, ...], get experts of high value, see `floors`.
    """
    sizes, strategy = program.sizes, program.strategy

    def assign_layer(
        evidence: Evidence, key: Array, pressure: TierPressure | None
    ) -> Assignment:
        assignment = strategy.assign(evidence, hyper, sizes, key)
        check_type("the strategy has an `assign` that", assignment, Assignment)
        slots = (sizes.cohort_size, sizes.max_held)
        chex.assert_shape([assignment.held, assignment.slot], slots)
        if pressure is not None:
            own = evidence.fitness, evidence.capacity, pressure
            rest = hyper.fairness.tradeoff, strategy.local_experts
            assignment = lift_tiers(assignment, *own, *rest)
        if program.static.privacy.flip:
            assignment = request(
                assignment,
                evidence.client,
                hyper,
                key,
                num_experts=sizes.num_experts,
                local_experts=strategy.local_experts,
            )
        return bias_slots(assignment, evidence, hyper, strategy)

    over_layers = map_layers(assign_layer, sizes.num_layers, (EVIDENCE, 0, 0), 1)
    return over_layers(evidence, layer_keys(key, sizes.num_layers), pressure)


def learn_layers(
    state: SimState,
    evidence: Evidence,
    assignment: Assignment,
    replies: Reply,
    hyper: Hyper,
    program: Program,
) -> tuple[AlignState, Array]:
    """Fitness, usage and the strategy's state after the round; its load [G, E]."""
    sizes, arrived = program.sizes, replies.arrived
    received, chosen = replies.outcome.received, replies.chosen
    if chosen is not None:  # who has received nothing has chosen nothing
        chosen &= received[:, None, None]

    def known(leaf: Array) -> Array:
        shape = arrived.shape + (1,) * (leaf.ndim - 1)
        return jnp.where(arrived.reshape(shape), leaf, 0.0)

    def learn_layer(
        align: AlignState,
        evidence: Evidence,
        assignment: Assignment,
        feedback: Feedback,
        report: PyTree,
        chosen: Array | None,
        key: Array,
    ) -> tuple[AlignState, Array]:
        trained = assignment if chosen is None else assignment.replace(slot=chosen)
        load = count_load(feedback, arrived, trained, sizes.num_experts)
        learnt = learn(
            *(align, evidence.client, assignment, trained, feedback),
            *(arrived, received, load, key),
            hyper=hyper,
            static=program.static,
        )
        feedback, report = jax.tree.map(known, (feedback, report))
        own = program.strategy.update(evidence, trained, feedback, report, hyper)
        check_form("the strategy has an `update` that", own, evidence.state)
        return learnt.replace(strategy=own), load

    over_layers = map_layers(
        learn_layer, sizes.num_layers, (ALIGN, EVIDENCE, 1, 1, 1, 1, 0), (ALIGN, 0)
    )
    reset_key = make_keys(state.key, state.round).of(RESET)
    keys = layer_keys(reset_key, sizes.num_layers)
    reply = replies.feedback, replies.report, chosen
    align, load = over_layers(state.align, evidence, assignment, *reply, keys)
    if replies.load is not None:
        slots = assignment if chosen is None else assignment.replace(slot=chosen)
        load = place_load(replies.load, arrived, slots, sizes.num_experts)
    return align, load


def place_load(
    load: Array, arrived: Array, trained: Assignment, num_experts: int
) -> Array:
    """Examples trained, [G, E], where clients report only noisy ones.

    Args:
      load: [C, G, K] float32, which they do not report.
      arrived: [C] bool, whether the client's update counts.
      trained: leaves [C, G, K].
      num_experts: E.
    """
    counted = jnp.where(trained.slot & arrived[:, None, None], load, 0.0)
    layer = jnp.arange(load.shape[1])[None, :, None]
    return jnp.zeros((load.shape[1], num_experts)).at[layer, trained.held].add(counted)
