"""The inputs of a cohort's clients, the conditions of their work, and its judge."""

import jax
import jax.numpy as jnp

from fedmoe_jax.capacity import Capacity, count_examples
from fedmoe_jax.cohort import JudgeFn
from fedmoe_jax.program import Program
from fedmoe_jax.traffic import find_ways, plan_traffic
from fedmoe_jax.types import (
    Array,
    Assignment,
    ClientInput,
    Evidence,
    Hyper,
    SimState,
    Sizes,
)
from fedmoe_jax.world.outcome import Conditions, Outcome, judge_client
from fedmoe_jax.world.step import View


def gather_evidence(
    state: SimState, view: View, cohort: Array, capacity: Capacity, sizes: Sizes
) -> Evidence:
    """The strategy's view of the cohort [C]."""
    align = state.align
    return Evidence(
        round=state.round,
        client=cohort,
        fitness=align.fitness[cohort],
        usage=align.usage,
        capacity=capacity.belief.capacity[cohort],
        load=count_examples(view.federation, sizes)[cohort],
        held=align.held[cohort],
        state=align.strategy,
    )


def set_conditions(
    state: SimState,
    view: View,
    evidence: Evidence,
    assignment: Assignment,
    hyper: Hyper,
    program: Program,
) -> Conditions:
    """The conditions of every cohort client's work, with a leading C axis."""
    equipped = state.participation.equipped[evidence.client]
    take = lambda leaf: leaf[evidence.client]
    events = jax.tree.map(take, view.events)
    if program.strategy.silent:  # clients need no link
        never = jnp.zeros_like(events.reachable)
        events = events.replace(reachable=~never, no_download=never, no_upload=never)
    return Conditions(
        client=evidence.client,
        device=jax.tree.map(take, view.devices),
        events=events,
        traffic=plan_traffic(evidence, assignment, equipped, hyper, program),
        examples=evidence.load,
    )


def broadcast(
    state: SimState,
    view: View,
    evidence: Evidence,
    assignment: Assignment,
    program: Program,
) -> ClientInput:
    """The inputs of every cohort client, with a leading C axis."""
    strategy, cohort, federation = program.strategy, evidence.client, view.federation
    steps, size = federation.steps[cohort], federation.size[cohort]
    scale, calibration = jnp.ones(cohort.shape), assignment.calibration
    if calibration is None:
        calibration = jnp.ones((len(cohort), program.sizes.num_layers))
    share = federation.size / federation.size.sum()
    correct = lambda rows: jnp.tensordot(share, rows, axes=1)[None] - rows[cohort]
    if strategy.step_scale:
        scale = strategy.step_scale(steps, size, program.static.client.momentum)
    return ClientInput(
        client=cohort,
        steps=steps,
        scale=scale,
        budget=evidence.capacity,
        held=assignment.held,
        slot=assignment.slot,
        calibration=calibration,
        correction=jax.tree.map(correct, state.variate),
        personal=jax.tree.map(lambda leaf: leaf[cohort], state.personal),
        distortion=jax.tree.map(lambda leaf: leaf[cohort], view.distortion),
    )


def build_judge(program: Program) -> JudgeFn:
    """Builds `judge(conditions, sent, finite) -> Outcome` of ONE client's round."""
    static, ways = program.static, find_ways(program.strategy)

    def judge(conditions: Conditions, sent: Array, finite: Array) -> Outcome:
        return judge_client(
            conditions,
            jnp.zeros(()) if program.strategy.silent else sent,
            finite,
            costs=program.device_costs,
            ways=ways,
            overload=static.devices.overload == "lose",
            deadline=static.devices.deadline,
            late=static.late.kind,
        )

    return judge
