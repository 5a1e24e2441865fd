"""The world inside the compiled round: who is reached, what is off, what drifts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    STORM,
    USERS_OPTIONS,
    C,
    N,
    R,
    assert_same,
    choose,
    make_linear_model,
    plan_run,
    tiny_config,
)
from fedmoe_jax.rules import CALM

from fedmoe_jax.evaluate import build_evaluate
from fedmoe_jax.program import init_state
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import replicate
from fedmoe_jax.train import run as train
from fedmoe_jax.types import Keys, Sizes
from fedmoe_jax.world.availability import (
    Reach,
    choose_cohort,
    draw_dropout,
    reach_share,
    sample_weighted,
)
from fedmoe_jax.world.costs import count_costs
from fedmoe_jax.world.outcome import OUTCOMES
from fedmoe_jax.world.step import init_world, observe, step_world

# ---- availability


def test_the_share_that_can_be_reached_follows_the_hour_by_hand():
    phase = jnp.array([0.0, 0.25, 0.5])
    numbers = dict(share=jnp.float32(0.6), swing=jnp.float32(0.5), day=jnp.float32(4))
    at = lambda round: reach_share(jnp.int32(round), phase, **numbers)
    np.testing.assert_allclose(at(0), [0.6, 1.0, 0.6], atol=1e-6)  # 1.1 is cut to 1
    np.testing.assert_allclose(at(1), [1.0, 0.6, 0.1], atol=1e-6)
    np.testing.assert_allclose(at(5), at(1), atol=1e-6)


def test_clients_are_drawn_in_proportion_to_their_weight():
    weight = jnp.array([1.0, 2.0, 5.0, 0.0])
    keys = jax.random.split(jax.random.key(1), 4000)
    one = jax.vmap(lambda key: sample_weighted(key, weight, 1))(keys)
    share = np.bincount(np.ravel(one), minlength=4) / 4000
    np.testing.assert_allclose(share, [1 / 8, 2 / 8, 5 / 8, 0], atol=0.03)
    two = np.array(jax.vmap(lambda key: sample_weighted(key, weight, 2))(keys))
    assert np.all(np.diff(two, axis=1) > 0)
    # without replacement: P(0 and 1) = 1/8 x 2/7 + 2/8 x 1/6
    both = np.mean((two == [0, 1]).all(1))
    np.testing.assert_allclose(both, 1 / 28 + 1 / 24, atol=0.02)


def test_where_too_few_have_weight_the_cohort_is_filled_up():
    weight, rest = jnp.array([0.0, 1.0, 0.0, 0.0, 1.0]), set()
    for seed in range(20):
        cohort = sample_weighted(jax.random.key(seed), weight, 3)
        assert {1, 4} < set(cohort.tolist())
        rest.add(next(iter(set(cohort.tolist()) - {1, 4})))
    assert rest == {0, 2, 3}


def test_dropouts_happen_as_often_and_when_they_should():
    moment = np.array(draw_dropout(jax.random.key(2), 20_000, rate=0.2, early=0.25))
    assert abs(np.mean(moment < 1) - 0.2) < 0.01
    assert abs(np.mean(moment == 0) - 0.05) < 0.006
    during = moment[(moment > 0) & (moment < 1)]
    np.testing.assert_allclose(
        np.quantile(during, [0.25, 0.5, 0.75]), [1, 2, 3] / np.float64(4), atol=0.03
    )
    never = draw_dropout(jax.random.key(2), 100, rate=0.0, early=0.25)
    assert np.isposinf(never).all()


def test_cohorts_by_sampling():
    size = jnp.array([1, 1, 1, 1, 10_000_000])
    reach = jnp.array([True, False, True, False, False])
    sizes = Sizes(5, 2, 1, 1, 1, 1, 1, 1, 2, 1)
    draw = lambda kind, seed: choose_cohort(
        jax.random.key(seed), size, reach, sizes, kind
    ).tolist()
    assert all(draw("reachable", seed) == [0, 2] for seed in range(10))
    assert all(4 in draw("size", seed) for seed in range(10))
    seen = {tuple(draw("uniform", seed)) for seed in range(60)}
    assert len(seen) == 10  # every pair, whoever can be reached


def test_a_client_at_work_is_out_of_reach():
    federation = plan_run().federation
    here = jnp.arange(N) < 3
    states = {"reach": Reach(jnp.zeros(N), here), "busy": jnp.arange(N) == 0}
    events = observe(states, federation, None, choose("reach", "busy")).events
    assert np.flatnonzero(events.reachable).tolist() == [1, 2]
    alone = observe(states, federation, None, choose("busy")).events
    assert np.flatnonzero(~alone.reachable).tolist() == [0]


# ---- processes start and stay stationary


def test_processes_start_from_their_stationary_laws():
    plan = plan_run(**STORM | {"availability.swing": 0.0})
    hyper = jax.tree.map(jnp.asarray, plan.hyper)
    sizes = plan.program.sizes._replace(num_clients=20_000)
    chain = plan.program.processes
    state = init_world(jax.random.key(0), hyper, sizes, chain)
    run_key = jax.random.key(0)

    def step(state, round):
        keys = Keys(jax.random.fold_in(run_key, round), run_key)
        return step_world(state, keys, round, hyper, chain), state

    last, path = jax.lax.scan(step, state, jnp.arange(4))
    latents = lambda world: {
        "pressure": world["pressure"],
        "reach": world["reach"].now,
        "background": world["background"],
        "bandwidth": world["bandwidth"],
        "fading": world["wireless"].fading,
        "known": world["wireless"].known,
    }
    for now in map(latents, (state, last)):
        assert abs(now["pressure"].mean() - 0.3) < 0.015
        assert abs(now["reach"].mean() - 0.8) < 0.015
        for name in ("background", "bandwidth", "fading", "known"):
            assert abs(now[name].mean()) < 0.03 and abs(now[name].std() - 1) < 0.03
    path, states = latents(path), path
    by_lag = lambda name, lag: np.corrcoef(
        np.ravel(path[name][0]), np.ravel(path[name][lag])
    )[0, 1]
    for name, r in {
        "pressure": 0.5,
        "reach": 0.5,
        "bandwidth": 0.5,
        "fading": 0.9,
    }.items():
        np.testing.assert_allclose(
            [by_lag(name, 1), by_lag(name, 3)], [r, r**3], atol=0.03
        )
    assert states["labels"].tolist() == [0.25, 0.25, 0.5, 0.5]
    # Clients stay where they are.
    for leaf in (states["wireless"].gain_db, states["reach"].phase):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


# ---- what is off


@functools.cache
def run(seed=0, rounds=2, devices=1, as_users=False, **changes):
    """The state after two chunks of rounds, and the metrics of the last."""
    plan = plan_run(**dict(changes) | {"run.num_devices": devices})
    program = plan.program
    model = make_linear_model(program.sizes.num_experts)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    program = program._replace(model=model, costs=count_costs(shapes, 1.0, 1.0, 1.0))
    state = init_state(jax.random.key(seed), plan.hyper, program)
    parts = replicate((state, plan.federation, plan.hyper), program.mesh)
    state, federation, hyper = parts
    run_rounds = build_run_rounds(program)
    if as_users:
        run_rounds = run_rounds.lower(*parts).compile(compiler_options=USERS_OPTIONS)
    for _ in range(rounds):
        state, metrics = run_rounds(state, federation, hyper)
    evaluate = build_evaluate(
        program.model, program.sizes, program.rules, program.processes, program.mesh
    )
    return jax.device_get((state, metrics, evaluate(state, federation, hyper)))


# Processes in the program, none of which does anything.
IDLE = {
    "pressure.left": 1.0,
    "pressure.share": 0.5,
    "background.most": 1e-30,
    "bandwidth.spread": 1e-30,
    "availability.share": 1.0,
    "availability.swing": 1e-30,
    "availability.dropout": 1e-30,
    "devices.overload": "lose",
    "late.kind": "drop",
    "devices.deadline": 1e9,
    "devices.free_memory": 1.0,
    "profile.kind": "self_reported",
    "profile.deviation": 0.0,
    "drift.labels": 1e-30,
    "drift.images": "blur",
    "drift.strength": 0.0,
    "drift.start": 0,
    "drift.rounds": 2,
    "reaction.kind": "reset",
    "reaction.threshold": 1e9,
}


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_world_without_events_is_bitwise_the_run_without_a_world(chunk):
    alike = {"devices.deadline": 1e9, "run.client_chunk": chunk}
    state, metrics, accuracies = run(as_users=True, **alike)
    other, told, judged = run(as_users=True, **IDLE | alike)
    assert_same(state.params, other.params)
    assert_same(state.align.fitness, other.align.fitness)
    assert_same(state.align.usage, other.align.usage)
    assert_same(state.belief.capacity, other.belief.capacity)
    for name in metrics:
        np.testing.assert_array_equal(metrics[name], told[name], err_msg=name)
    for name in accuracies:
        np.testing.assert_array_equal(accuracies[name], judged[name], err_msg=name)
    idle = "pressure background bandwidth reach dropout labels images"
    assert set(state.world) == set() and set(other.world) == set(idle.split())
    assert told["merged_clients"].tolist() == [C] * R


def test_a_config_without_events_has_a_calm_world():
    calm = plan_run().program
    pooled = plan_run(**STORM | {"strategy": "centralised"}).program
    assert calm.rules.world == pooled.rules.world == CALM
    assert calm.processes == pooled.processes == ()


@pytest.mark.parametrize("strategy", ["load_balanced", "hfedmoe", "scaffold"])
def test_who_is_lost_to_memory_was_given_too_much(strategy):
    poor = {"devices.overload": "lose", "devices.free_memory": 0.1}
    _, metrics, _ = run(strategy=strategy, **poor, **{"devices.deadline": 1e9})
    lost = metrics["lost_memory_clients"]
    assert lost.min() > 0
    np.testing.assert_array_equal(metrics["capacity_violations"], lost)


# ---- the storm


def test_devices_do_not_change_the_storm():
    alone, told, judged = run(**STORM)
    shared, heard, checked = run(**STORM, devices=4)
    assert_same(alone, shared, atol=1e-5, rtol=1e-6)  # seconds go into the hundreds
    assert_same(told, heard, atol=1e-2)
    assert_same(judged, checked, atol=1e-2)
    assert_same(alone.participation.outcome.code, shared.participation.outcome.code)


def test_every_kind_of_event_happens_in_the_storm():
    seen = dict.fromkeys(OUTCOMES, 0.0)
    for seed in range(6):
        _, metrics, _ = run(seed=seed, **STORM)
        for name in seen:
            seen[name] += metrics[f"{name}_clients"].sum()
    seen.pop("nonfinite"), seen.pop("dropped"), seen.pop("stale")
    assert min(seen.values()) > 0, seen


def test_a_stopped_storm_goes_on_bitwise(tmp_path):
    changes = STORM | {"strategy": "flex_moe", "num_rounds": 8, "checkpoint.every": 4}
    config = tiny_config(**changes | {"data.name": "digits", "eval_every": 2})
    asked = iter([False, True])
    go_on, at_once = (lambda: False), (lambda: next(asked))
    common = dict(label="run", profile=False)
    assert train.train(config, tmp_path / "whole", stop=go_on, **common)
    assert not train.train(config, tmp_path / "cut", stop=at_once, **common)
    assert train.train(config, tmp_path / "cut", stop=go_on, **common)
    rows = [
        train.read_metrics(tmp_path / name / "metrics.jsonl")
        for name in ("whole", "cut")
    ]
    clock = ("seconds", "compile_seconds", "evaluation_seconds", "save_seconds")
    assert len(rows[0]) == len(rows[1]) == 8
    for row, again in zip(*rows, strict=True):
        for name in set(row) - set(clock):
            assert row[name] == again[name], name
    totals = [row["total_bytes_up"] for row in rows[1]]
    sums = np.cumsum([row["bytes_up"] for row in rows[1]])
    np.testing.assert_allclose(totals, sums, rtol=1e-12)


# ---- drift


def test_drifted_images_are_judged_apart():
    drift = {"drift.images": "rotate", "drift.start": 0, "drift.rounds": 1}
    strong = drift | {"drift.strength": 90.0, "drift.share": 0.5}
    state, metrics, accuracies = run(**strong)
    assert metrics["drift_distorted"].tolist() == [90.0] * R
    assert accuracies["drifted_accuracy"] != accuracies["global_accuracy"]
    plan = plan_run(**strong)
    drifts = np.asarray(plan.federation.drift_source) != np.arange(N)
    assert drifts.sum() == N // 2
    # A test set that is turned on the host gives the drifting clients' accuracies.
    program = plan.program
    model = make_linear_model(program.sizes.num_experts)
    rules = program.rules._replace(world=CALM)
    evaluate = build_evaluate(model, program.sizes, rules, (), program.mesh)
    calm = state.replace(world={})
    plain = evaluate(calm, replicate(plan.federation, program.mesh), plan.hyper)
    turned = np.rot90(plan.federation.test_x, axes=(1, 2)).copy()
    turned = evaluate(
        calm,
        replicate(plan.federation.replace(test_x=turned), program.mesh),
        plan.hyper,
    )
    expected = np.where(drifts, turned["client_accuracy"], plain["client_accuracy"])
    np.testing.assert_allclose(accuracies["client_accuracy"], expected, atol=0.02)
    np.testing.assert_allclose(
        accuracies["drifted_accuracy"], turned["global_accuracy"], atol=0.02
    )
    assert accuracies["global_accuracy"] == plain["global_accuracy"]


def test_a_run_that_reacts_to_drift_counts_its_alarms():
    alarmed = {"reaction.kind": "reset", "reaction.slack": 0.0}
    state, metrics, _ = run(**alarmed | {"reaction.threshold": 1e-3}, rounds=6)
    assert 0 < metrics["drift_alarms"].sum() <= state.align.detector.alarms
