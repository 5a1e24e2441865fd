"""One federated round as six pure steps, and a chunk of rounds as one program.

1 world      devices, links, availability and data of this round
2 capacity   in experts, as the server believes it
3 align      strategy: evidence -> held experts
4 train      client_update over the cohort; the outcome of each update
5 aggregate  masked per-expert mean, server optimiser
6 learn      fitness, usage, the strategy's state, the belief about devices
"""

import functools
from collections.abc import Callable

import chex
import jax

from fedmoe_jax.aggregate import Sums, aggregate
from fedmoe_jax.align_layers import assign, learn_layers
from fedmoe_jax.broadcast import broadcast, build_judge, gather_evidence, set_conditions
from fedmoe_jax.capacity import learn_devices, measure_capacity
from fedmoe_jax.client import build_client_update
from fedmoe_jax.cohort import build_train_cohort, exchange, renew_clients
from fedmoe_jax.disclosure.observer import OBSERVED, see_round
from fedmoe_jax.floors import press_cohort, press_tiers, serve
from fedmoe_jax.metrics import measure
from fedmoe_jax.optimizers import schedule_rates
from fedmoe_jax.program import Program
from fedmoe_jax.prune import learn_units, prune_cohort
from fedmoe_jax.reply import Reply
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.times import add_times
from fedmoe_jax.types import (
    Array,
    Federation,
    Hyper,
    PyTree,
    RoundFn,
    SimState,
    make_keys,
)
from fedmoe_jax.upcycle import copy_first, hold_first, is_warming, keep_scores
from fedmoe_jax.world.availability import choose_cohort
from fedmoe_jax.world.costs import train_chosen
from fedmoe_jax.world.outcome import is_late
from fedmoe_jax.world.participation import record
from fedmoe_jax.world.step import close_round, observe, step_world


def round_step(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    *,
    program: Program,
    train_cohort: Callable[..., tuple[tuple[Sums, ...], Reply]],
) -> tuple[SimState, dict[str, Array]]:
    """One federated round.

    Args:
      state: the simulation before the round.
      federation: data and devices.
      hyper: traced hyperparameters.
      program: the static parts.
      train_cohort: see `cohort.build_train_cohort`.

    Returns:
      The state after the round, shaped as before, and the round's metrics; among them
      `observed`, see `observer`, where a run is observed.
    """
    keys = make_keys(state.key, state.round)
    hyper = schedule_rates(hyper, state.round, program.static)
    warming = is_warming(state.round, hyper) if program.static.upcycled else None

    # 1 world
    world = step_world(state.world, keys, state.round, hyper, program.processes)
    view = observe(world, federation, hyper, program.processes)
    urge = press_cohort(state, hyper)
    cohort = choose_cohort(keys.cohort, view, program.sizes, program.static, urge)
    # 2 capacity
    capacity = measure_capacity(state.belief, view, hyper, program, state.round, keys)
    # 3 align
    evidence = gather_evidence(state, view, cohort, capacity.belief, hyper, program)
    evidence = add_times(evidence, state, view, capacity.belief, hyper, program)
    pressure = press_tiers(state, program)
    assignment = assign(evidence, hyper, program, keys.align, pressure)
    if warming is not None:
        assignment = hold_first(assignment, warming)
    pruned = prune_cohort(state, evidence, assignment, hyper, program)
    # 4 train
    decided = evidence, assignment, pruned
    inputs = broadcast(state, view, *decided, program)
    conditions = set_conditions(state, view, *decided, hyper, program)
    sums, replies = train_cohort(
        state.params, inputs, conditions, view.federation, hyper, keys.train
    )
    traffic = train_chosen(conditions.traffic, replies.chosen, pruned and pruned.share)
    conditions = conditions.replace(traffic=traffic)
    # 5 aggregate
    params, server_opt = aggregate(state, sums[0], hyper, program.static)
    if warming is not None:
        params, server_opt = (copy_first(t, warming) for t in (params, server_opt))
    personal, variate = renew_clients(state, federation.size, cohort, replies)
    # 6 learn
    align, load = learn_layers(state, evidence, assignment, replies, hyper, program)
    if warming is not None:
        align = keep_scores(state.align, align, warming)
    personal, align, sent = exchange(personal, align, evidence, replies, hyper, program)
    late = is_late(replies.outcome, program.static.devices.deadline)
    belief = learn_devices(capacity.belief, conditions, replies, hyper, program)
    after = SimState(
        round=state.round + 1,
        key=state.key,
        params=params,
        server_opt=server_opt,
        align=align,
        personal=personal,
        variate=variate,
        world=close_round(
            world, cohort, replies.outcome, late, hyper, program.processes
        ),
        belief=belief,
        stale=sums[1] if state.stale else {},
        participation=record(
            state.participation, cohort, capacity.true, replies.outcome
        ),
        pruning=learn_units(state.pruning, inputs, replies, hyper, program),
        queues=serve(state, evidence, assignment, pressure, replies, hyper, program),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    metrics: PyTree = measure(
        *(state, after, capacity, view, inputs, conditions, replies, sent, load),
        hyper,
        program,
    )
    if program.static.privacy.observe:
        link = assignment, conditions, replies, sent
        metrics[OBSERVED] = see_round(*link, program)
    return after, metrics


def build_round(program: Program) -> RoundFn:
    """Builds `round_step(state, federation, hyper) -> (state, metrics)` of a program.

    It is written for one device of the mesh, see `sharding.spread`.
    """
    client_update = build_client_update(program)
    train_cohort = build_train_cohort(client_update, build_judge(program), program)
    return functools.partial(round_step, program=program, train_cohort=train_cohort)


def scan_rounds(program: Program) -> RoundFn:
    """R rounds of ONE run, written for one device; metrics gain a leading R axis."""
    one_round = build_round(program)

    def run_rounds(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, dict[str, Array]]:
        next_round = lambda carry, _: one_round(carry, federation, hyper)
        return jax.lax.scan(next_round, state, length=program.static.chunk_rounds)

    return run_rounds


@functools.cache
def build_run_rounds(program: Program) -> RoundFn:
    """Builds `run_rounds(state, federation, hyper) -> (state, metrics)`, R rounds.

    One jitted program; every metric gains a leading R axis. The state is donated, so
    the caller must rebind it. Equal programs share one compiled program.
    """
    return jax.jit(spread(scan_rounds(program), program.mesh), donate_argnums=0)
