"""What every client of a cohort is sent, how it works, and how its round is judged."""

import jax
import jax.numpy as jnp

from fedmoe_jax.client import ClientInput
from fedmoe_jax.cohort import JudgeFn
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Assignment, Evidence, SimState
from fedmoe_jax.world.outcome import Conditions, Outcome, judge_client
from fedmoe_jax.world.step import View
from fedmoe_jax.world.traffic import find_ways, plan_traffic


def set_conditions(
    view: View,
    evidence: Evidence,
    assignment: Assignment,
    equipped: Array,
    program: Program,
) -> Conditions:
    """Under which every cohort client works, with a leading C axis.

    `equipped` [N] bool are the clients that have the frozen parts.
    """
    take = lambda leaf: leaf[evidence.client]
    events = jax.tree.map(take, view.events)
    if program.rules.silent:  # nobody has to reach them
        never = jnp.zeros_like(events.reachable)
        events = events.replace(reachable=~never, no_download=never, no_upload=never)
    return Conditions(
        device=jax.tree.map(take, view.devices),
        events=events,
        traffic=plan_traffic(
            evidence,
            assignment,
            equipped[evidence.client],
            program.sizes,
            program.rules,
        ),
        examples=evidence.load,
    )


def find_distortion(world: dict, drift_source: Array, cohort: Array) -> Array | None:
    """How far the images of each cohort client [C] have drifted; None for no drift."""
    if "distorted" not in world:
        return None
    return jnp.where(drift_source[cohort] != cohort, world["distorted"], 0.0)


def broadcast(
    state: SimState,
    world: dict,
    view: View,
    evidence: Evidence,
    assignment: Assignment,
    program: Program,
) -> ClientInput:
    """What every cohort client is sent, and how it works, with a leading C axis."""
    rules, cohort, federation = program.rules, evidence.client, view.federation
    steps, size = federation.steps[cohort], federation.size[cohort]
    scale, calibration = jnp.ones(cohort.shape), assignment.calibration
    if calibration is None:
        calibration = jnp.ones(cohort.shape)
    share = federation.size / federation.size.sum()
    correct = lambda rows: jnp.tensordot(share, rows, axes=1)[None] - rows[cohort]
    if rules.step_scale:
        scale = rules.step_scale(steps, size, rules.momentum)
    return ClientInput(
        client=cohort,
        steps=steps,
        scale=scale,
        budget=evidence.capacity,
        held=assignment.held,
        slot=assignment.slot,
        calibration=calibration,
        correction=jax.tree.map(correct, state.variate),
        own=jax.tree.map(lambda leaf: leaf[cohort], state.personal),
        distortion=find_distortion(world, federation.drift_source, cohort),
        conditions=set_conditions(
            view, evidence, assignment, state.participation.equipped, program
        ),
    )


def build_judge(program: Program) -> JudgeFn:
    """Builds `judge(inputs, sent, finite) -> Outcome` of ONE client's round."""
    rules, ways = program.rules, find_ways(program.rules)

    def judge(inputs: ClientInput, sent: Array, finite: Array) -> Outcome:
        return judge_client(
            inputs.conditions,
            jnp.zeros(()) if rules.silent else sent,
            finite,
            costs=program.device_costs,
            ways=ways,
            overload=rules.world.overload,
            deadline=rules.deadline,
            late=rules.world.late,
        )

    return judge
