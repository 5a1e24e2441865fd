"""The world in whole rounds: which clients are reached, what is off, what drifts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    STORM,
    USERS_OPTIONS,
    C,
    E,
    K,
    N,
    R,
    all_finite,
    assert_same,
    make_devices,
    plan_run,
    start_run,
    tiny_config,
    use_linear_model,
)

from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.round import build_round, build_run_rounds
from fedmoe_jax.runtime.sharding import replicate, spread
from fedmoe_jax.train import run as train
from fedmoe_jax.world.costs import TRAINING_COPIES
from fedmoe_jax.world.outcome import OUTCOMES
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

# ---- what is off


@functools.cache
def run(seed=0, rounds=2, devices=1, as_users=False, **changes):
    """The state after chunks of rounds, the metrics of the last, and accuracies."""
    plan = plan_run(**changes, **{"run.num_devices": devices})
    program, state, *inputs = start_run(plan, use_linear_model(plan.program), seed)
    run_rounds = build_run_rounds(program)
    if as_users:
        lowered = run_rounds.lower(state, *inputs)
        run_rounds = lowered.compile(compiler_options=USERS_OPTIONS)
    for _ in range(rounds):
        state, metrics = run_rounds(state, *inputs)
    return jax.device_get((state, metrics, build_evaluate(program)(state, *inputs)))


# Processes in the program, none of which does anything.
IDLE = {
    "pressure.left": 1.0,
    "pressure.share": 0.5,
    "background.most": 1e-30,
    "bandwidth.spread": 1e-30,
    "availability.share": 1.0,
    "availability.swing": 1e-30,
    "availability.capacity_bias": 1e-30,
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
    other, found, scored = run(as_users=True, **IDLE | alike)
    assert_same(state.params, other.params)
    assert_same(state.align.fitness, other.align.fitness)
    assert_same(state.align.usage, other.align.usage)
    assert_same(state.belief.capacity, other.belief.capacity)
    for name in metrics:
        # The mean of the changes, which XLA may sum in another order.
        near = {"rtol": 2e-7 if name == "fitness_change" else 0}
        np.testing.assert_allclose(metrics[name], found[name], err_msg=name, **near)
    for name in accuracies:
        np.testing.assert_array_equal(accuracies[name], scored[name], err_msg=name)
    idle = "pressure background bandwidth reach bias dropout labels images"
    assert set(state.world) == set() and set(other.world) == set(idle.split())
    assert found["merged_clients"].tolist() == [C] * R


def test_pooled_data_are_in_a_calm_world():
    calm = plan_run().program
    storm = STORM | {"availability.sampling": "size", "strategy": "centralised"}
    pooled = plan_run(**storm).program
    for static in (calm.static, pooled.static):
        assert static.availability.sampling == "uniform"
        assert static.devices.overload == "ignore" and static.late.kind == "wait"
        assert static.profile.kind == "oracle" and static.reaction.kind == "none"
    assert calm.processes == pooled.processes == ()


@pytest.mark.parametrize("strategy", ["load_balanced", "hfedmoe", "scaffold", "ifca"])
def test_clients_lost_to_memory_were_given_too_much(strategy):
    poor = {"devices.overload": "lose", "devices.free_memory": 0.1}
    _, metrics, _ = run(strategy=strategy, **poor, **{"devices.deadline": 1e9})
    lost = metrics["lost_memory_clients"]
    assert lost.min() > 0
    np.testing.assert_array_equal(metrics["capacity_violations"], lost)


# ---- the storm


def test_devices_do_not_change_the_storm():
    one, four = run(**STORM), run(**STORM, devices=4)
    # Seconds go into the hundreds.
    for left, right, close in zip(
        *(one, four), ({"atol": 1e-5, "rtol": 1e-6}, *[{"atol": 1e-2}] * 2), strict=True
    ):
        assert_same(left, right, **close)
    codes = [state.participation.outcome.code for state, *_ in (one, four)]
    assert_same(*codes)


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


def test_drifted_images_are_scored_apart_and_for_clients_that_drift_alone():
    drift = {"drift.images": "rotate", "drift.start": 0, "drift.rounds": 1}
    strong = drift | {"drift.strength": 90.0, "drift.share": 0.5}
    state, metrics, accuracies = run(**strong)
    assert metrics["drift_distorted"].tolist() == [90.0] * R
    assert accuracies["drifted_accuracy"] != accuracies["global_accuracy"]
    plan = plan_run(**strong)
    drifts = np.asarray(plan.federation.drift_source) != np.arange(N)
    assert drifts.sum() == N // 2
    # A test set that is turned on the host gives the drifting clients' accuracies.
    program = use_linear_model(plan.program)._replace(processes=())
    evaluate, calm = build_evaluate(program), state.replace(world={})
    plain = evaluate(calm, replicate(plan.federation, program.mesh), plan.hyper)
    x = np.rot90(plan.federation.test["x"], axes=(1, 2)).copy()
    federation = plan.federation.replace(test=plan.federation.test | {"x": x})
    turned = evaluate(calm, replicate(federation, program.mesh), plan.hyper)
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


# ---- rounds in which all clients take part


def begin(devices=None, **changes):
    """A run in which all clients are in every cohort, on devices that feel it as is."""
    plan = plan_run(**{"cohort_size": N, "devices.buffer": 0.0} | changes)
    if devices is not None:
        plan = plan._replace(federation=plan.federation.replace(devices=devices))
    flops = dict(stem=100.0, gate=50.0, head=0.0, experts=200.0)
    program = use_linear_model(plan.program, **flops)
    return start_run(plan, program._replace(device_costs=program.costs))


def compile_round(program):
    return jax.jit(spread(build_round(program), program.mesh))


SHARDS = {"partition.kind": "shards", "partition.classes_per_client": 2}


def test_personal_accuracy_follows_the_labels_that_moved():
    program, state, federation, hyper = begin(**SHARDS | {"drift.labels": 1.0})
    drift_source = np.asarray(federation.drift_source)
    assert sorted(drift_source) == list(range(N))
    assert not np.any(drift_source == np.arange(N))
    # The examples of client 0 in the end have the labels of its mix and no others.
    all_moved = {"labels": jnp.float32(1)}
    moved = observe(all_moved, federation, hyper, program.processes).federation
    label = np.asarray(moved.train["y"])[np.asarray(moved.index[0, : moved.size[0]])]
    assert set(label) == set(np.flatnonzero(moved.label_mix[0]))
    # Clients that hold the same experts differ by their label mixes only.
    align = state.align.replace(held=jnp.ones((N, 1, E), bool))
    evaluate = build_evaluate(program)

    def score(moved):
        world = {"labels": jnp.float32(moved)}
        moment = state.replace(align=align, world=world)
        return evaluate(moment, federation, hyper)["client_accuracy"]

    before, after = score(0), score(1)
    np.testing.assert_allclose(after, before[drift_source], atol=1e-6)
    assert np.abs(before[drift_source] - before).max() > 0.01


def test_paces_are_estimated_as_the_world_leaves_them():
    # Latents that never change after the first draw.
    processes = {
        "background.most": 0.8,
        "background.persistence": 1.0,
        "bandwidth.spread": 0.5,
        "bandwidth.persistence": 1.0,
    }
    devices = make_devices(N, flops=2e3, upload=50.0, download=300.0, latency=0.5)
    program, state, federation, hyper = begin(
        devices, **processes | {"profile.kind": "estimated"}
    )
    one_round = compile_round(program)
    load, level = (np.array(state.world[name]) for name in ("background", "bandwidth"))
    idle = 1 - 0.8 * np.array(jax.scipy.stats.norm.cdf(load))
    speed = np.exp(0.5 * level - 0.125)
    truth = np.stack([300 * speed, 2e3 * idle, 50 * speed], axis=-1)
    for _ in range(3):
        state, _ = one_round(state, federation, hyper)
    np.testing.assert_allclose(state.belief.history.pace, 1 / truth, rtol=1e-3)
    # From one round to the next, training takes four times as long.
    slow = federation.replace(devices=devices.replace(flops=devices.flops / 4))
    for _ in range(3):
        state, _ = one_round(state, replicate(slow, program.mesh), hyper)
    factor = np.array([1, 4 - 3 * 0.7**3, 1], np.float32)
    np.testing.assert_allclose(state.belief.history.pace, factor / truth, rtol=1e-3)


def test_the_oracle_knows_which_clients_are_under_pressure():
    costs = begin().program.device_costs
    whole = lambda experts: (
        costs.shared_bytes + costs.gate_bytes + (experts * costs.expert_bytes)
    )
    # Room for three and a half experts, and under pressure for one and a half.
    pressure = {"pressure.share": 0.5, "pressure.left": whole(1.5) / whole(3.5)}
    devices = make_devices(N, memory=TRAINING_COPIES * whole(3.5))
    program, *start = begin(devices, **pressure)
    state, metrics = compile_round(program)(*start)
    pressed = np.array(state.world["pressure"])
    assert 0 < pressed.sum() < N and K == 2 and E > 3
    np.testing.assert_array_equal(state.belief.capacity, np.where(pressed, 1, 2))
    # What devices have room for is not cut to what a client may hold.
    np.testing.assert_array_equal(state.participation.capacity, np.where(pressed, 1, 3))
    assert metrics["capacity_error"] == 0
    assert metrics["capacity_violations"] == 0


def test_a_round_of_drift_trains_on_what_has_drifted():
    drift = {
        "drift.labels": 1.0,
        "drift.images": "rotate",
        "drift.strength": 90.0,
        "drift.share": 0.5,
        "drift.start": 0,
        "drift.rounds": 1,
    }
    program, start, federation, hyper = begin(**SHARDS | drift)
    state, _ = compile_round(program)(start, federation, hyper)
    drifted, federation = jax.device_get((state.params, federation))
    drift_source = federation.drift_source
    move = dict(
        index=federation.index[drift_source], size=federation.size[drift_source]
    )
    move["label_mix"] = federation.label_mix[drift_source]
    moved = federation.replace(**move)
    # The images of the clients that drift, turned before the run.
    drifts = np.flatnonzero(drift_source != np.arange(N))
    own = np.concatenate([moved.index[c, : moved.size[c]] for c in drifts])
    x = federation.train["x"].copy()
    x[own] = np.rot90(x[own], axes=(1, 2))
    assert len(drifts) == N // 2 and not np.array_equal(x, federation.train["x"])
    turn = lambda federation: federation.replace(train=federation.train | {"x": x})
    one_round = compile_round(program._replace(processes=()))
    calm = start.replace(world={})

    def differ(federation):
        federation = replicate(federation, program.mesh)
        params = one_round(calm, federation, hyper)[0].params
        assert all_finite(params)
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, drifted)
        return max(jax.tree.leaves(gaps))

    assert differ(turn(moved)) < 1e-4
    # Neither the labels nor the images alone explain it.
    assert differ(moved) > 1e-3 and differ(turn(federation)) > 1e-3
