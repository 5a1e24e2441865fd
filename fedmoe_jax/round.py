"""One federated round as six pure steps, and a chunk of rounds as one program.

1 world    who is reachable
2 profile  capacity in experts
3 align    strategy: evidence -> held experts
4 train    client_update over the cohort
5 merge    masked per-expert mean, server optimiser
6 learn    fitness, usage
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.align.learn import count_load, learn
from fedmoe_jax.client import ClientTask, build_client_update
from fedmoe_jax.cohort import Report, build_train_cohort
from fedmoe_jax.merge import Sums, merge, server_optimizer
from fedmoe_jax.profile import profile
from fedmoe_jax.round_metrics import measure
from fedmoe_jax.rules import Rules
from fedmoe_jax.setup import Setup
from fedmoe_jax.sharding import spread
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Federation,
    Hyper,
    RoundFn,
    SimState,
    Sizes,
)
from fedmoe_jax.world.availability import sample_cohort


def count_examples(federation: Federation, sizes: Sizes) -> Array:
    """Examples every client trains in a round, repeats included: [N] float32."""
    return (federation.steps * sizes.batch_size).astype(jnp.float32)


def believe_capacity(federation: Federation, hyper: Hyper, setup: Setup) -> Array:
    """Experts every client can hold, as the server believes: [N] int32 >= 1."""
    sizes = setup.sizes
    return profile(
        federation.devices,
        setup.device_costs,
        hyper,
        examples=count_examples(federation, sizes),
        deadline=setup.rules.deadline,
        communication_share=setup.rules.communication_share,
        max_capacity=sizes.max_capacity,
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


def make_tasks(
    state: SimState,
    federation: Federation,
    evidence: Evidence,
    assignment: Assignment,
    rules: Rules,
) -> ClientTask:
    """What every cohort client is sent, with a leading C axis."""
    cohort = evidence.client
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
    )


def round_step(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    *,
    setup: Setup,
    train_cohort: Callable[..., tuple[Sums, Report]],
) -> tuple[SimState, dict[str, Array]]:
    """One federated round.

    Args:
      state: the simulation before the round.
      federation: data and devices.
      hyper: traced hyperparameters.
      setup: the static parts.
      train_cohort: see `cohort.build_train_cohort`.

    Returns:
      The state after the round, shaped as before, and the round's metrics.
    """
    sizes, rules, align = setup.sizes, setup.rules, state.align
    round_key = jax.random.fold_in(state.key, state.round)
    world_key, align_key, train_key = jax.random.split(round_key, 3)

    # 1 world
    cohort = sample_cohort(world_key, sizes.num_clients, sizes.cohort_size)
    # 2 profile
    capacity = believe_capacity(federation, hyper, setup)
    # 3 align
    evidence = gather_evidence(state, federation, cohort, capacity, sizes)
    assignment = setup.strategy.assign(evidence, hyper, sizes, align_key)
    slots = (sizes.cohort_size, sizes.max_held)
    chex.assert_shape([assignment.held, assignment.slot], slots)
    # 4 train
    tasks = make_tasks(state, federation, evidence, assignment, rules)
    sums, report = train_cohort(state.params, tasks, federation, hyper, train_key)
    # 5 merge
    tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
    params, server_opt = merge(state.params, state.server_opt, sums, tx)
    trained = jnp.where(report.finite, cohort, sizes.num_clients)  # others keep theirs
    renew = lambda rows, new: rows.at[trained].set(new, mode="drop")
    personal = jax.tree.map(renew, state.personal, report.own)
    variate = jax.tree.map(renew, state.variate, report.variate)
    # 6 learn
    load = count_load(report, assignment, sizes.num_experts)
    learnt = learn(align, cohort, assignment, report, load, hyper, rules.feedback)
    known = lambda leaf: jnp.where(report.finite[:, None], leaf, 0.0)
    feedback = jax.tree.map(known, report.feedback)
    memory = setup.strategy.learn(evidence, assignment, feedback, hyper)
    personal, memory, *exchanged = setup.strategy.exchange(
        personal, memory, evidence, hyper
    )
    learnt = learnt.replace(memory=memory)

    new_state = SimState(
        round=state.round + 1,
        key=state.key,
        params=params,
        server_opt=server_opt,
        align=learnt,
        personal=personal,
        variate=variate,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    return new_state, measure(
        align, learnt, evidence, assignment, report, exchanged, load, federation, setup
    )


def build_round(setup: Setup) -> RoundFn:
    """Builds `round_step(state, federation, hyper) -> (state, metrics)` of a setup.

    It is written for one device of the mesh, see `sharding.spread`.
    """
    client_update = build_client_update(setup.model, setup.sizes, setup.rules)
    train_cohort = build_train_cohort(client_update, setup.rules)
    return functools.partial(round_step, setup=setup, train_cohort=train_cohort)


def scan_rounds(setup: Setup) -> RoundFn:
    """R rounds of ONE run, written for one device; metrics gain a leading R axis."""
    one_round = build_round(setup)

    def run_rounds(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, dict[str, Array]]:
        next_round = lambda carry, _: one_round(carry, federation, hyper)
        return jax.lax.scan(next_round, state, length=setup.rules.chunk_rounds)

    return run_rounds


@functools.cache
def build_run_rounds(setup: Setup) -> RoundFn:
    """Builds `run_rounds(state, federation, hyper) -> (state, metrics)`, R rounds.

    One jitted program; every metric gains a leading R axis. The state is donated, so
    the caller must rebind it. Equal setups share one program.
    """
    return jax.jit(spread(scan_rounds(setup), setup.mesh), donate_argnums=0)
