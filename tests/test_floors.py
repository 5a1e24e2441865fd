"""Floors in runs: what is off is not there, and what is on keeps its promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SMALL,
    C,
    K,
    N,
    assert_same_results,
    make_evidence,
    make_feedback,
    make_replies,
    plan_run,
    run_alone,
    start,
    stop_at,
    tiny_config,
    use_linear_model,
)

from fedmoe_jax import align_layers, floors, reply
from fedmoe_jax.round import build_run_rounds, scan_rounds
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.train.plan import program_key
from fedmoe_jax.types import Assignment
from fedmoe_jax.world.availability import sample_weighted

ON = {
    "fairness.floor": 0.3,
    "fairness.expert_floor": 0.75,
    "fairness.power": 2.0,
}

# ---- the promise


@pytest.mark.parametrize(
    ("informed", "most"), [(True, 0.25), (False, 0.16)], ids=["reachable", "uniform"]
)
def test_a_feasible_floor_is_met_in_the_long_run(informed, most):
    """Twenty clients that can be reached in 30 to 100 % of the rounds; cohorts of 5.

    Blind draws find them in turn: 5 / sum(1 / a) = 0.157 would be all that there is.
    """
    reach, rounds = jnp.linspace(0.3, 1.0, 20), 3000

    @jax.jit
    def simulate(floor):
        def step(queue, key):
            there = jax.random.bernoulli(jax.random.fold_in(key, 1), reach)
            weight = there.astype(jnp.float32) if informed else jnp.ones(20)
            chosen = sample_weighted(key, weight, 5, queue / 2.0)
            arrived = there[chosen]
            count = jnp.zeros(20).at[chosen].add(arrived)
            return floors.serve_clients(queue, chosen, arrived, floor), count

        keys = jax.random.split(jax.random.key(0), rounds)
        queue, counts = jax.lax.scan(step, jnp.zeros(20), keys)
        return queue, counts.mean(axis=0)

    floor = 0.85 * most
    _, free = simulate(0.0)
    queue, share = simulate(floor)
    assert float(free.min()) < floor - 0.03
    assert float(queue.max()) / rounds < 0.005
    assert float(share.min()) > floor - 0.005
    # One that nobody could meet is not met, and its queues show it.
    queue, share = simulate(0.35)
    assert float(share.min()) < 0.32 and float(queue.max()) / rounds > 0.03


@functools.cache
def play(rounds=10, **changes):
    """State and metrics [rounds] of a tiny run."""
    plan = plan_run(**changes)
    program = use_linear_model(plan.program)
    run, run_rounds = start(plan, program), build_run_rounds(program)
    state, found = run.state, []
    for _ in range(rounds // plan.config.chunk_rounds):
        state, metrics = run_rounds(state, run.federation, run.hyper)
        found.append(metrics)
    join = lambda *leaves: np.concatenate(leaves)
    return jax.device_get(state), jax.tree.map(join, *jax.device_get(found))


@pytest.mark.slow
def test_floors_of_a_run_bind_its_cohorts_and_its_tiers():
    """Four of ten clients a round: a floor of 0.3 leaves nobody out for long."""
    state, metrics = play(20, strategy="greedy", **ON)
    rounds, queue = state.participation.rounds, state.queues["clients"]
    assert (rounds >= 20 * np.float32(0.3) - queue - 1e-4).all()
    assert metrics["longest_queue"][-1] == queue.max() and queue.max() < 2
    assert rounds.min() >= 4
    free, other = play(20, strategy="greedy")
    assert free.participation.rounds.min() < rounds.min()
    assert free.queues == {} and "longest_queue" not in other
    tiers = state.queues["tiers"]
    assert tiers.queue.shape == (1, K) and tiers.rounds.max() <= 20
    share = tiers.served / tiers.rounds
    assert (share >= 0.75 - tiers.queue / tiers.rounds - 1e-5).all()
    np.testing.assert_allclose(metrics["least_tier_share"][-1], share.min())
    assert metrics["longest_tier_queue"][-1] == tiers.queue.max()


@pytest.mark.slow
def test_a_stopped_run_with_floors_goes_on_bitwise(tmp_path):
    changes = ON | {"fairness.floor": 0.5}
    config = tiny_config(**SMALL | {"data.name": "digits"} | changes)
    assert run_alone(config, tmp_path / "whole")
    assert not run_alone(config, tmp_path / "cut", stop_at(tmp_path / "cut", 2))
    assert run_alone(config, tmp_path / "cut")
    assert_same_results(tmp_path / "whole", tmp_path / "cut")


# ---- what is off


@functools.cache
def trace(**changes):
    """The jaxpr of two rounds, as text."""
    plan = plan_run(**changes)
    program = use_linear_model(plan.program)
    run, rounds = start(plan, program), spread(scan_rounds(program), program.mesh)
    return str(jax.make_jaxpr(rounds)(run.state, run.federation, run.hyper))


@pytest.mark.slow
def test_what_is_off_is_not_in_the_program(monkeypatch):
    plain = trace()
    assert trace(**{"fairness.tradeoff": 7.0}) == plain
    on = [trace(**{name: value}) for name, value in ON.items()]
    assert len({plain, *on}) == 4 and min(map(len, on)) > len(plain)

    def refuse(*args, **kwargs):
        raise AssertionError("off")

    names = {
        floors: ("serve_clients", "serve_tiers", "find_top_experts"),
        align_layers: ("lift_tiers",),
        reply: ("emphasise",),
    }
    for module, functions in names.items():
        for name in functions:
            monkeypatch.setattr(module, name, refuse)
    trace.cache_clear()
    assert trace() == plain
    for name, value in ON.items():
        with pytest.raises(AssertionError, match="off"):
            trace(**{name: value})
    trace.cache_clear()


def test_a_sweep_over_what_is_on_is_one_program():
    other = {name: value / 2 for name, value in ON.items()}
    more = {"fairness.tradeoff": 3.0, "availability.capacity_bias": 0.1}
    less = {"availability.capacity_bias": 0.2}
    plans = plan_run(**ON, **more), plan_run(**other, **less)
    assert len({program_key(plan) for plan in plans}) == 1
    assert program_key(plan_run(**less)) != program_key(plans[0])


def test_init_queues_has_those_that_are_on():
    shapes = lambda **changes: jax.tree.map(
        lambda leaf: leaf.shape, floors.init_queues(plan_run(**changes).program)
    )
    assert shapes() == shapes(**{"fairness.power": 1.0}) == {}
    assert shapes(**{"fairness.floor": 0.3}) == {"clients": (N,)}
    tiers = shapes(**{"fairness.expert_floor": 0.3})["tiers"]
    assert tiers.queue == tiers.rounds == tiers.served == (1, K)


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "pfedmoe", "fedmoe_da"])
def test_an_expert_floor_is_off_where_there_is_no_choice(strategy):
    program = plan_run(strategy=strategy, **ON).program
    assert set(floors.init_queues(program)) == {"clients"}
    assert program.static.fairness.power


def test_pooled_data_have_no_floors():
    program = plan_run(strategy="centralised", **ON).program
    assert floors.init_queues(program) == {} and not program.static.fairness.power


# ---- one round


@pytest.mark.slow
@pytest.mark.parametrize(("round", "moves"), [(1, False), (2, True)])
def test_queues_of_tiers_stand_still_in_a_warm_up(round, moves):
    """In rounds 0 and 1 all clients train one expert; who takes part counts there."""
    plan = plan_run(**ON, **{"upcycle.rounds": 2})
    program, slots = use_linear_model(plan.program), (C, 1, K)
    state = start(plan, program).state.replace(round=jnp.int32(round))
    held = jnp.tile(jnp.arange(2, 2 + K), (C, 1, 1))
    low = state.align.fitness.at[..., 2:].set(0.0)  # no top experts, these
    state = state.replace(align=state.align.replace(fitness=low))
    evidence = make_evidence(program.sizes, client=jnp.arange(C))
    replies = make_replies(make_feedback(jnp.ones(slots)), np.arange(C) > 0)
    queues = floors.serve(
        *(state, evidence, Assignment(held, jnp.ones(slots, bool))),
        *(floors.press_tiers(state, program), replies, plan.hyper, program),
    )
    floor = np.float32(0.3)
    expected = [floor, 0, 0, 0, *[floor] * (N - C)]
    np.testing.assert_array_equal(queues["clients"], expected)
    assert queues["tiers"].queue.tolist() == [[0.75 * moves] * K]
    assert queues["tiers"].rounds.tolist() == [[int(moves)] * K]


def test_experts_that_a_client_has_not_chosen_do_not_serve_its_tier():
    plan = plan_run(strategy="ifca", **{"fairness.expert_floor": 0.75})
    program = use_linear_model(plan.program)
    shape = C, 1, program.sizes.max_held
    state = start(plan, program).state
    top = floors.find_top_experts(state.align, 0)[0]
    held = jnp.broadcast_to(jnp.arange(shape[2]), shape)
    evidence = make_evidence(program.sizes, client=jnp.arange(C))
    evidence = evidence.replace(capacity=jnp.ones(C, jnp.int32))

    def serve(chosen):
        feedback, arrived = make_feedback(jnp.ones(shape)), np.ones(C, bool)
        replies = make_replies(feedback, arrived, chosen=chosen)
        queues = floors.serve(
            *(state, evidence, Assignment(held, jnp.ones(shape, bool))),
            *(floors.press_tiers(state, program), replies, plan.hyper, program),
        )
        return float(queues["tiers"].served[0, 0])

    assert serve(jnp.broadcast_to(top, shape)) == 1
    assert serve(jnp.broadcast_to(~top, shape)) == 0
    assert serve((jnp.arange(C) == 0)[:, None, None] & top[None, None]) == 1 / C


def test_press_cohort_is_the_queue_over_the_tradeoff():
    plan = plan_run(**{"fairness.floor": 0.3, "fairness.tradeoff": 4.0})
    state = start(plan, use_linear_model(plan.program)).state
    state = state.replace(queues={"clients": jnp.arange(10.0)})
    urge = floors.press_cohort(state, plan.hyper)
    np.testing.assert_allclose(urge, np.arange(10) / 4)
    assert floors.press_cohort(state.replace(queues={}), plan.hyper) is None
