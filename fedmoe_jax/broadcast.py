"""The inputs of a cohort's clients, the conditions of their work, and its judge."""

import jax
import jax.numpy as jnp

from fedmoe_jax.capacity import Belief, count_examples
from fedmoe_jax.models.submodel import is_local
from fedmoe_jax.privacy.selection import hide_fitness
from fedmoe_jax.probe import find_hold_key
from fedmoe_jax.program import Program
from fedmoe_jax.prune import Pruned, count_reported, spread_room
from fedmoe_jax.reply import JudgeFn
from fedmoe_jax.types import (
    Array,
    Assignment,
    ClientInput,
    Evidence,
    ExpertLinks,
    Hyper,
    PyTree,
    SimState,
    make_keys,
)
from fedmoe_jax.world.costs import FEEDBACK_NUMBERS, Traffic, add_cover
from fedmoe_jax.world.outcome import Conditions, Outcome, judge_client
from fedmoe_jax.world.step import View


def gather_evidence(
    state: SimState,
    view: View,
    cohort: Array,
    belief: Belief,
    hyper: Hyper,
    program: Program,
) -> Evidence:
    """The strategy's view of the cohort [C], of clients whose devices it believes.

    Where experts are pruned the capacity is that of pruned ones.
    """
    align, sizes = state.align, program.sizes
    fitness = align.fitness[cohort]
    if program.static.privacy.selection:
        keys = make_keys(state.key, state.round)
        fitness = hide_fitness(fitness, cohort, hyper, keys)
    evidence = Evidence(
        round=state.round,
        client=cohort,
        fitness=fitness,
        usage=align.usage,
        capacity=belief.capacity[cohort],
        size=view.federation.size[cohort],
        load=count_examples(view.federation, sizes)[cohort],
        held=align.held[cohort],
        times_held=align.times_held[cohort],
        state=align.strategy,
    )
    if belief.room is None:
        return evidence
    room = belief.room[cohort]
    capacity = spread_room(room, state.round, hyper, sizes)
    return evidence.replace(capacity=capacity, room=room)


def plan_traffic(
    evidence: Evidence,
    assignment: Assignment,
    pruned: Pruned | None,
    equipped: Array,
    hyper: Hyper,
    program: Program,
) -> Traffic:
    """The cohort's traffic, but for what it sends, which is not known yet.

    `equipped` [C] bool are the clients that have the frozen parts.
    """
    strategy, num_experts = program.strategy, program.sizes.num_experts
    per_layer = lambda slots: slots.sum((1, 2)) / program.sizes.num_layers
    whole = assignment.slot if pruned is None else pruned.share
    held = per_layer(whole)
    stays = is_local(assignment.held, num_experts, strategy.local_experts)
    local = per_layer(whole * stays)
    some = strategy.expert_priority is not None
    trained = jnp.minimum(held, evidence.capacity) if some else held
    shown = jnp.zeros(held.shape)
    if strategy.gate_period:
        shown += evidence.round % strategy.gate_period(hyper) == 0
    talks = 0.0 if strategy.silent else 1.0
    slots, probes = assignment.slot.sum((1, 2)), program.static.probes
    feedback = (FEEDBACK_NUMBERS + probes) * slots
    if pruned is not None:
        feedback += count_reported(pruned, program)
    traffic = Traffic(
        held=held,
        trained=trained,
        sent=jnp.zeros(held.shape),
        received=talks * (held - local),
        reported=talks * (feedback + program.report_numbers),
        shown=shown,
        new=(~equipped).astype(jnp.float32),
        probed=program.sizes.batch_size * slots if probes else None,
        biases=None if assignment.bias is None else talks * assignment.slot.sum((1, 2)),
        pruned=None if pruned is None else pruned.stem,
        saved=None if pruned is None else pruned.saved,
        slots=None if pruned is None else per_layer(assignment.slot),
        density=None if pruned is None else pruned.density,
    )
    if assignment.asked is None:
        return traffic
    cover = per_layer(assignment.asked) - (held - local)
    idle = assignment.asked.sum((1, 2)) - (assignment.slot & ~stays).sum((1, 2))
    return add_cover(traffic, cover, idle, probes)


def set_conditions(
    state: SimState,
    view: View,
    evidence: Evidence,
    assignment: Assignment,
    pruned: Pruned | None,
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
        traffic=plan_traffic(evidence, assignment, pruned, equipped, hyper, program),
        examples=evidence.load,
    )


def correct(variate: PyTree, cohort: Array) -> PyTree:
    """The corrections of the cohort's gradients, like params with a leading C axis."""
    if not variate:
        return {}
    difference = lambda mean, rows: mean[None] - rows[cohort]
    return jax.tree.map(difference, variate["mean"], variate["own"])


def broadcast(
    state: SimState,
    view: View,
    evidence: Evidence,
    assignment: Assignment,
    pruned: Pruned | None,
    program: Program,
) -> ClientInput:
    """The inputs of every cohort client, with a leading C axis."""
    strategy, cohort, federation = program.strategy, evidence.client, view.federation
    steps, size = federation.steps[cohort], federation.size[cohort]
    scale, calibration = jnp.ones(cohort.shape), assignment.calibration
    if calibration is None:
        calibration = jnp.ones((len(cohort), program.sizes.num_layers))
    hold_key = None
    if program.static.probes:
        hold_key = jax.vmap(find_hold_key, (None, 0))(state.key, cohort)
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
        correction=correct(state.variate, cohort),
        personal=jax.tree.map(lambda leaf: leaf[cohort], state.personal),
        distortion=jax.tree.map(lambda leaf: leaf[cohort], view.distortion),
        hold_key=hold_key,
        bias=assignment.bias,
        masks=None if pruned is None else pruned.masks,
        links=send_links(view, len(cohort), program),
    )


def send_links(view: View, count: int, program: Program) -> ExpertLinks | None:
    """The experts' links of each client of the cohort [C], the same for all.

    None where the program's model has none, as a dense one has none.
    """
    if program.static.expert_links.kind == "none":
        return None
    repeat = lambda leaf: jnp.broadcast_to(leaf[None], (count, *leaf.shape))
    return jax.tree.map(repeat, view.links)


def build_judge(program: Program) -> JudgeFn:
    """Builds `judge(conditions, sent, finite) -> Outcome` of ONE client's round."""
    static = program.static

    def judge(conditions: Conditions, sent: Array, finite: Array) -> Outcome:
        return judge_client(
            conditions,
            jnp.zeros(()) if program.strategy.silent else sent,
            finite,
            costs=program.device_costs,
            overload=static.devices.overload == "lose",
            deadline=static.devices.deadline,
            late=static.late.kind,
        )

    return judge
