"""What every client of a cohort is sent, how it works, and how its round is judged."""

import jax
import jax.numpy as jnp

from fedmoe_jax.client import ClientTask
from fedmoe_jax.cohort import JudgeFn
from fedmoe_jax.outcome import Conditions, Outcome, judge_client
from fedmoe_jax.program import Setup
from fedmoe_jax.traffic import find_ways, plan_traffic
from fedmoe_jax.types import Array, Assignment, Evidence, SimState
from fedmoe_jax.world.advance import Today


def set_conditions(
    today: Today,
    evidence: Evidence,
    assignment: Assignment,
    equipped: Array,
    setup: Setup,
) -> Conditions:
    """Under which every cohort client works, with a leading C axis.

    `equipped` [N] bool are the clients that have the frozen parts.
    """
    take = lambda leaf: leaf[evidence.client]
    fate = jax.tree.map(take, today.fate)
    if setup.rules.silent:  # nobody has to reach them
        never = jnp.zeros_like(fate.reachable)
        fate = fate.replace(reachable=~never, no_download=never, no_upload=never)
    return Conditions(
        device=jax.tree.map(take, today.devices),
        fate=fate,
        traffic=plan_traffic(
            evidence, assignment, equipped[evidence.client], setup.sizes, setup.rules
        ),
        examples=evidence.load,
    )


def find_distortion(world: dict, heir: Array, cohort: Array) -> Array | None:
    """How far the images of each cohort client [C] have drifted; None for no drift."""
    if "distorted" not in world:
        return None
    return jnp.where(heir[cohort] != cohort, world["distorted"], 0.0)


def make_tasks(
    state: SimState,
    world: dict,
    today: Today,
    evidence: Evidence,
    assignment: Assignment,
    setup: Setup,
) -> ClientTask:
    """What every cohort client is sent, and how it works, with a leading C axis."""
    rules, cohort, federation = setup.rules, evidence.client, today.federation
    steps, size = federation.steps[cohort], federation.size[cohort]
    scale, calibration = jnp.ones(cohort.shape), assignment.calibration
    if calibration is None:
        calibration = jnp.ones(cohort.shape)
    share = federation.size / federation.size.sum()
    correct = lambda rows: jnp.tensordot(share, rows, axes=1)[None] - rows[cohort]
    if rules.step_scale:
        scale = rules.step_scale(steps, size, rules.momentum)
    return ClientTask(
        client=cohort,
        steps=steps,
        scale=scale,
        budget=evidence.capacity,
        held=assignment.held,
        slot=assignment.slot,
        calibration=calibration,
        correction=jax.tree.map(correct, state.variate),
        own=jax.tree.map(lambda leaf: leaf[cohort], state.personal),
        distortion=find_distortion(world, federation.heir, cohort),
        conditions=set_conditions(
            today, evidence, assignment, state.ledger.equipped, setup
        ),
    )


def build_judge(setup: Setup) -> JudgeFn:
    """Builds `judge(task, sent, finite) -> Outcome` of ONE client's round."""
    rules, ways = setup.rules, find_ways(setup.rules)

    def judge(task: ClientTask, sent: Array, finite: Array) -> Outcome:
        return judge_client(
            task.conditions,
            jnp.zeros(()) if rules.silent else sent,
            finite,
            costs=setup.device_costs,
            ways=ways,
            overload=rules.world.overload,
            deadline=rules.deadline,
            late=rules.world.late,
        )

    return judge
