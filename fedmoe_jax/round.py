"""One federated round as six pure steps, and a chunk of rounds as one program.

1 world    what the devices have left, who is reachable, what the data have become
2 profile  capacity in experts, as the server believes it
3 align    strategy: evidence -> held experts
4 train    client_update over the cohort; what becomes of each update
5 merge    masked per-expert mean, server optimiser
6 learn    fitness, usage, the belief about devices
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.aggregate import Sums, add_stale, merge, server_optimizer
from fedmoe_jax.align.capacity import (
    Belief,
    Needs,
    count_capacity,
    update_belief,
    update_history,
)
from fedmoe_jax.align.learn import count_load, learn
from fedmoe_jax.broadcast import broadcast, build_judge
from fedmoe_jax.client import ClientInput, build_client_update
from fedmoe_jax.cohort import Report, build_train_cohort
from fedmoe_jax.metrics import measure
from fedmoe_jax.program import Program
from fedmoe_jax.rules import Rules
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.types import (
    Array,
    Evidence,
    Federation,
    Hyper,
    PyTree,
    RoundFn,
    SimState,
    Sizes,
)
from fedmoe_jax.world.costs import client_bytes, client_flops
from fedmoe_jax.world.outcome import STALE
from fedmoe_jax.world.participation import record
from fedmoe_jax.world.step import Keys, choose_cohort, observe, step_world
from fedmoe_jax.world.traffic import find_ways


def count_examples(federation: Federation, sizes: Sizes) -> Array:
    """Examples every client trains in a round, repeats included: [N] float32."""
    return (federation.steps * sizes.batch_size).astype(jnp.float32)


def list_needs(federation: Federation, program: Program) -> Needs:
    """What the clients' capacity is counted from."""
    return Needs(
        costs=program.device_costs,
        examples=count_examples(federation, program.sizes),
        deadline=program.rules.deadline,
        communication_share=program.rules.communication_share,
        max_capacity=program.sizes.max_capacity,
    )


def gather_evidence(
    state: SimState,
    federation: Federation,
    cohort: Array,
    capacity: Array,
    sizes: Sizes,
) -> Evidence:
    """What a strategy sees of the cohort [C]; `capacity` is [N]."""
    return Evidence(
        round=state.round,
        client=cohort,
        fitness=state.align.fitness[cohort],
        usage=state.align.usage,
        capacity=capacity[cohort],
        load=count_examples(federation, sizes)[cohort],
        held=state.align.held[cohort],
        memory=state.align.memory,
    )


def learn_devices(
    belief: Belief, inputs: ClientInput, report: Report, hyper: Hyper, program: Program
) -> Belief:
    """The belief after the round; who estimates has seen times and failures."""
    if not belief.history:
        return belief
    conditions, ways = inputs.conditions, find_ways(program.rules)
    traffic = conditions.traffic.replace(sent=report.sent)
    up, down = client_bytes(program.device_costs, traffic, ways)
    flops = client_flops(program.device_costs, traffic, ways, conditions.examples)
    history = update_history(
        belief.history,
        inputs.client,
        traffic.trained,
        jnp.stack([down, flops, up], axis=-1),
        report.outcome,
        conditions.device.latency,
        rate=hyper.world["profile"]["rate"],
        caution=hyper.world["profile"]["caution"],
        max_capacity=program.sizes.max_capacity,
    )
    return belief.replace(history=history)


def merge_round(
    state: SimState, sums: tuple[Sums, ...], hyper: Hyper, rules: Rules
) -> tuple[PyTree, PyTree]:
    """Step 5: new params and server optimiser state, stale updates included."""
    total = sums[0]
    if state.stale:
        total = add_stale(total, state.stale, hyper.world["late"]["discount"])
    tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
    return merge(state.params, state.server_opt, total, tx)


def mark_busy(world: dict, cohort: Array, report: Report, deadline: float) -> dict:
    """The world's state, in which late clients still work in the next round.

    That is who sends a stale update, and who is lost only after the deadline.
    """
    if "busy" not in world:
        return world
    worked = (report.outcome.phases * report.outcome.spent).sum(1)
    late = (report.outcome.code == STALE) | (worked > deadline)
    return world | {"busy": jnp.zeros_like(world["busy"]).at[cohort].set(late)}


def round_step(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    *,
    program: Program,
    train_cohort: Callable[..., tuple[tuple[Sums, ...], Report]],
) -> tuple[SimState, dict[str, Array]]:
    """One federated round.

    Args:
      state: the simulation before the round.
      federation: data and devices.
      hyper: traced hyperparameters.
      program: the static parts.
      train_cohort: see `cohort.build_train_cohort`.

    Returns:
      The state after the round, shaped as before, and the round's metrics.
    """
    sizes, rules, align = program.sizes, program.rules, state.align
    round_key = jax.random.fold_in(state.key, state.round)
    keys = Keys(round_key, state.key)
    world_key, align_key, train_key = jax.random.split(round_key, 3)

    # 1 world
    world = step_world(keys, state.world, state.round, hyper)
    view = observe(keys, world, federation, hyper, rules.world)
    federation = view.federation
    cohort = choose_cohort(
        world_key, federation.size, world, sizes, rules.world.sampling
    )
    # 2 profile
    needs, kind = list_needs(federation, program), rules.world.profile
    belief = update_belief(
        state.belief, view.devices, hyper, needs, kind, state.round, keys
    )
    # 3 align
    evidence = gather_evidence(state, federation, cohort, belief.capacity, sizes)
    assignment = program.strategy.assign(evidence, hyper, sizes, align_key)
    slots = (sizes.cohort_size, sizes.max_held)
    chex.assert_shape([assignment.held, assignment.slot], slots)
    # 4 train
    inputs = broadcast(state, world, view, evidence, assignment, program)
    sums, report = train_cohort(state.params, inputs, federation, hyper, train_key)
    # 5 merge
    params, server_opt = merge_round(state, sums, hyper, rules)
    arrived = jnp.where(report.arrived, cohort, sizes.num_clients)  # others keep theirs
    renew = lambda rows, new: rows.at[arrived].set(new, mode="drop")
    personal = jax.tree.map(renew, state.personal, report.own)
    variate = jax.tree.map(renew, state.variate, report.variate)
    # 6 learn
    load = count_load(report, assignment, sizes.num_experts)
    learnt = learn(align, cohort, assignment, report, load, hyper, rules, keys)
    known = lambda leaf: jnp.where(report.arrived[:, None], leaf, 0.0)
    feedback = jax.tree.map(known, report.feedback)
    memory = program.strategy.learn(evidence, assignment, feedback, hyper)
    personal, memory, *exchanged = program.strategy.exchange(
        personal, memory, evidence, report.arrived, hyper
    )
    wide = needs._replace(max_capacity=max(sizes.num_experts, sizes.max_capacity))
    capacity = count_capacity(view.devices, jnp.zeros(()), wide)
    meant = jnp.maximum(count_capacity(view.devices, hyper.buffer, needs), 1)

    new_state = SimState(
        round=state.round + 1,
        key=state.key,
        params=params,
        server_opt=server_opt,
        align=learnt.replace(memory=memory),
        personal=personal,
        variate=variate,
        world=mark_busy(world, cohort, report, rules.deadline),
        belief=learn_devices(belief, inputs, report, hyper, program),
        stale=sums[1] if state.stale else {},
        participation=record(state.participation, cohort, capacity, report.outcome),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    return new_state, measure(
        state, new_state, meant, federation, inputs, report, exchanged, load, program
    )


def build_round(program: Program) -> RoundFn:
    """Builds `round_step(state, federation, hyper) -> (state, metrics)` of a program.

    It is written for one device of the mesh, see `sharding.spread`.
    """
    client_update = build_client_update(program.model, program.sizes, program.rules)
    train_cohort = build_train_cohort(
        client_update, build_judge(program), program.rules
    )
    return functools.partial(round_step, program=program, train_cohort=train_cohort)


def scan_rounds(program: Program) -> RoundFn:
    """R rounds of ONE run, written for one device; metrics gain a leading R axis."""
    one_round = build_round(program)

    def run_rounds(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, dict[str, Array]]:
        next_round = lambda carry, _: one_round(carry, federation, hyper)
        return jax.lax.scan(next_round, state, length=program.rules.chunk_rounds)

    return run_rounds


@functools.cache
def build_run_rounds(program: Program) -> RoundFn:
    """Builds `run_rounds(state, federation, hyper) -> (state, metrics)`, R rounds.

    One jitted program; every metric gains a leading R axis. The state is donated, so
    the caller must rebind it. Equal setups share one program.
    """
    return jax.jit(spread(scan_rounds(program), program.mesh), donate_argnums=0)
