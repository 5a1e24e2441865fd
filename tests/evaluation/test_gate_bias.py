"""The bias of gates: against gates whose own biases are shifted, and in whole runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SMALL,
    assert_same_results,
    make_config,
    rows_of,
    run_alone,
    start_run,
    stop_at,
    tiny_config,
    use_linear_model,
)
from factories import plan_run as plan_images

from fedmoe_jax.evaluation.evaluate import build_evaluate, build_evaluate_share
from fedmoe_jax.evaluation.finetune import gather_input
from fedmoe_jax.evaluation.gate_bias import bias_clients
from fedmoe_jax.evaluation.own_tests import take_rows
from fedmoe_jax.evaluation.panel import gather_panel
from fedmoe_jax.evaluation.scoring import evaluation_route
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.program import find_overwritten
from fedmoe_jax.round import build_round
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train.plan import plan_run
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

BIAS, IDLE, LOST, FLAT = 3.0, 2, 3, 4  # the clients that are not like others
IMAGES = {"evaluation.dense_experts": 16}
TEXT = {
    "data.name": "markov",
    "data.length": 8,
    "partition.kind": "natural",
    "num_clients": 8,
    "model.kind": "transformer",
    "model.stem_width": 8,
    "model.expert_width": 8,
    "model.heads": 2,
    "model.kv_heads": 1,
    "num_active": 1,
}
ASIDES = {"partition.test_share": 0.2, "partition.unseen": 2}
DISPATCHED = {"evaluation.dense_experts": 1}
CASES = {
    "images": ("greedy", ASIDES),
    "images, dispatched": ("greedy", DISPATCHED | ASIDES | {"num_active": 1}),
    "images, one device alone": ("greedy", {"run.num_devices": 2}),
    "images, no parts": ("greedy", {"parts": None, "partition.test_share": 0.2}),
    "images, personal gates": ("greedy", {"gate.mode": "personal"} | ASIDES),
    "images, the group": ("oracle", {"num_active": 1}),
    "images, own experts": ("pfedmoe", {"num_active": 1}),
    "images, probabilities": ("fedmix_all", {"gate.mode": "personal"}),
    "images, gates of all": ("hfedmoe", {}),
    "text": ("greedy", TEXT),
    "text, prefix": ("flex_moe", TEXT | {"gate.input": "prefix"}),
    "text, tied": ("greedy", TEXT | {"model.tied": True, "num_active": 2}),
    "text, one loop": ("greedy", TEXT | {"model.scan": True, "model.remat": True}),
}


def start_study(strategy, changes, bias=BIAS):
    """A run of clients that hold experts; of one that does not, and one that lost."""
    changes = dict(changes)
    parts = changes.pop("parts", True)
    plan = plan_images(strategy=strategy, **{"gate.bias": bias} | changes)
    program = plan.program
    if program.model.parts is not None:
        program = use_linear_model(program)
    if parts is None:
        program = program._replace(model=program.model._replace(parts=None))
    run, rng = start_run(plan, program), np.random.default_rng(0)
    noise = lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape)
    params, personal = jax.tree.map(noise, (run.state.params, run.state.personal))
    align, sizes = run.state.align, program.sizes
    order = rng.random(align.held.shape).argsort(axis=2)
    held = jnp.asarray(order < sizes.max_held).at[IDLE].set(False)
    fitness = jnp.asarray(rng.random(align.fitness.shape), jnp.float32)
    rounds = jnp.ones(sizes.num_clients, jnp.int32).at[jnp.array([IDLE, LOST])].set(0)
    state = run.state.replace(
        params=params,
        personal=personal,
        align=align.replace(held=held, fitness=fitness.at[FLAT].set(0.5)),
        participation=run.state.participation.replace(rounds=rounds),
    )
    return run._replace(state=state)


def bias_slowly(run, client):
    """The bias [G, E] of ONE client, in NumPy."""
    found = run.state.align.strategy
    if client in (IDLE, LOST, FLAT) and "own" not in found:
        return np.zeros(run.state.align.fitness.shape[1:], np.float32)
    if "own" in found:
        return BIAS * np.asarray(found["own"])[:, client] * (client not in (IDLE, LOST))
    fitness = np.asarray(run.state.align.fitness, np.float64)[client]
    low = fitness.min(axis=1, keepdims=True)
    return BIAS * (fitness - low) / (fitness.max(axis=1, keepdims=True) - low)


def shift_gates(gates, bias):
    """Gates whose own biases have grown by `bias` [G, E]."""

    def shift(gate, own):
        if "bias" in gate:
            return gate | {"bias": gate["bias"] + own}
        return {name: shift(each, own) for name, each in gate.items()}  # tied blocks

    names = layer_names(gates)
    return {name: shift(gates[name], bias[g]) for g, name in enumerate(names)}


@functools.partial(jax.jit, static_argnums=0)
def score_slowly(program, state, federation, client, slot, rows, bias):
    """Scores of ONE client's whole model that routes among some experts, no bias."""
    own = jax.tree.map(lambda leaf: leaf[client], state.personal)
    everything = jnp.broadcast_to(jnp.arange(slot.shape[1]), slot.shape)
    local = program.strategy.local_experts
    params = take_submodel(state.params, own, everything, local)
    params |= {"gate": shift_gates(params["gate"], bias)}
    batch = program.task.prepare(rows, federation.statistics)
    slots, how = (everything, slot), evaluation_route(program)
    frozen = federation.frozen
    outputs, _ = program.model.apply(params, frozen, batch, *slots, how, None)
    scores = program.task.loss(outputs, batch)
    weight = jnp.ones_like(scores.score) if scores.weight is None else scores.weight
    sums = (scores.score * weight, weight)
    return [leaf.reshape(len(leaf), -1).sum(axis=1) for leaf in sums]


def answer_slowly(run, client, rows, bias):
    """Hits and weights [B] of ONE client's model with shifted gates."""
    slot = np.asarray(run.state.align.held)[client] | (client in (IDLE, LOST))
    inputs = run.state, run.federation, client, slot, rows, np.float32(bias)
    return jax.device_get(score_slowly(run.program, *inputs))


def evaluate(run, hyper=None):
    found = build_evaluate(run.program)(run.state, run.federation, hyper or run.hyper)
    return jax.device_get(found)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_that_of_shifted_gates(case):
    strategy, changes = CASES[case]
    run = start_study(strategy, changes)
    found, federation = evaluate(run), run.federation
    stratum, mix = np.asarray(federation.test_stratum), federation.label_mix
    clients, moved = range(run.program.sizes.num_clients), []
    for client in clients:
        bias = bias_slowly(run, client)
        hit, weight = answer_slowly(run, client, federation.test, bias)
        plain, _ = answer_slowly(run, client, federation.test, 0 * bias)
        labels = np.arange(mix.shape[1])
        mean = lambda hits, k, w=weight: (
            hits[stratum == k].sum() / max(w[stratum == k].sum(), 1)
        )
        expected = sum(float(mix[client, k]) * mean(hit, k) for k in labels)
        # An example whose best classes are equal to rounding may fall either way.
        near = dict(atol=3e-3, err_msg=str(client))
        np.testing.assert_allclose(found["client_accuracy"][client], expected, **near)
        moved.append(np.abs(hit - plain).sum())
    assert np.sum(np.array(moved) > 5) > len(moved) / 3  # the bias matters
    lists = federation.own_test
    if lists is None:
        return
    took_part = [c for c in clients if c not in (IDLE, LOST)]
    own = []
    for client in took_part if run.program.strategy.personal else clients:
        ids = lists.index[client, : lists.size[client]]
        rows, bias = take_rows(federation, ids), bias_slowly(run, client)
        hit, weight = answer_slowly(run, client, rows, bias)
        own.append(hit.sum() / max(weight.sum(), 1))
    np.testing.assert_allclose(found["own_test_accuracy"], np.mean(own), atol=2e-3)


@pytest.mark.parametrize("case", ["images", "images, no parts", "text"])
def test_evaluation_without_a_size_is_that_of_a_program_without_a_bias(case):
    """Global scores, those of unseen clients too, have no bias, whatever its size."""
    strategy, changes = CASES[case]
    biased, plain = (start_study(strategy, changes, bias) for bias in (BIAS, 0.0))
    assert plain.program.strategy.affinity is None
    found, expected = evaluate(biased), evaluate(plain)
    assert found["personal_accuracy"] != expected["personal_accuracy"]
    whole = [n for n in expected if n.startswith(("global", "unseen", "stratum_"))]
    assert len(whole) >= 2
    for name in (*whole, "specialisation"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    without = evaluate(biased, biased.hyper._replace(gate=plain.hyper.gate))
    assert without.keys() == expected.keys()
    for name, value in expected.items():
        near = dict(atol=1e-6, err_msg=name)
        np.testing.assert_allclose(without[name], value, **near)


def test_a_sample_of_clients_is_scored_with_their_own_bias():
    run = start_study("greedy", {"evaluation.clients": 4})
    found, whole = evaluate(run), evaluate(start_study("greedy", {}))
    chosen = np.array(run.federation.sample_order)[:4]
    scored = np.flatnonzero(~np.isnan(found["client_accuracy"]))
    assert scored.tolist() == sorted(chosen.tolist())
    values = whole["client_accuracy"][scored]
    np.testing.assert_allclose(found["client_accuracy"][scored], values, atol=1e-6)


@pytest.mark.parametrize("case", ["images", "text"])
def test_bias_clients_is_of_every_layer_by_hand(case):
    run = start_study(*CASES[case])
    view = observe(run.state.world, run.federation, run.hyper, run.program.processes)
    found = bias_clients(run.state, view, run.hyper, run.program)
    assert found.shape == run.state.align.fitness.shape
    for client in range(run.program.sizes.num_clients):
        if client not in (IDLE, LOST):  # evaluation lets these have none
            expected = bias_slowly(run, client)
            np.testing.assert_allclose(found[client], expected, rtol=1e-4, atol=1e-5)
    none = run.program._replace(strategy=run.program.strategy._replace(affinity=None))
    assert bias_clients(run.state, view, run.hyper, none) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_bias_or_no_gate(strategy):
    """A round and an evaluation are traced, not run."""
    config = tiny_config(strategy=strategy, **{"gate.bias": BIAS})
    plan = plan_run(config, build_mesh(1))
    program = plan.program
    gateless = program.sizes.num_experts == 1 or program.strategy.gating == "sum"
    assert (program.strategy.affinity is None) == gateless
    assert (find_overwritten(config).get("gate.bias") == 0) == gateless
    assert plan.hyper.gate.bias == (0 if gateless else BIAS)
    if gateless:  # the same program as without
        plain = plan_images(strategy=strategy)
        assert plain.program.strategy == program.strategy
        return
    run = start_run(plan, use_linear_model(program))
    for build in (build_round, build_evaluate_share):
        function = spread(build(run.program), program.mesh)
        jax.eval_shape(function, *run[1:])


@pytest.mark.parametrize("changes", [ASIDES, TEXT])
def test_a_program_without_a_bias_has_no_trace_of_one(changes):
    """It reads no size, and neither inputs nor models have a bias."""
    run = start_study("greedy", changes | {"evaluation.finetune": True}, bias=0.0)
    program, hyper = run.program, run.hyper._replace(gate=None)
    for build in (build_round, build_evaluate_share):
        jax.eval_shape(spread(build(program), program.mesh), *run[1:3], hyper)
    view = observe(run.state.world, run.federation, hyper, program.processes)
    assert bias_clients(run.state, view, hyper, program) is None
    panel = gather_panel(run.state, view, None, program)
    assert panel.models.view.bias is None
    assert panel.sets is None or panel.sets.bias is None
    own = gather_input(run.state, view, hyper, None, jnp.int32(0), program)
    assert own.bias is None


# ---- whole runs

SHORT = SMALL | {"strategy": "greedy", "run.tensorboard": False}


def test_a_run_resumes_bitwise_and_a_bias_changes_it(tmp_path):
    config = make_config(**SHORT, **{"gate.bias": BIAS})
    assert run_alone(config, tmp_path / "whole")
    assert not run_alone(config, tmp_path / "parts", stop_at(tmp_path / "parts", 2))
    assert run_alone(config, tmp_path / "parts")
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    assert run_alone(make_config(**SHORT), tmp_path / "plain")
    found, plain = rows_of(tmp_path / "whole"), rows_of(tmp_path / "plain")
    assert abs(found[-1]["train_loss"] - plain[-1]["train_loss"]) > 1e-3
    slots = np.array(np.load(tmp_path / "whole" / "final.npz")["times_held"]).sum()
    both = [sum(row["bytes_down"] for row in rows) for rows in (found, plain)]
    assert both[0] == 4 * slots + both[1]


def test_a_tiny_bias_is_nearly_none(tmp_path):
    for name, bias in (("none", 0.0), ("tiny", 1e-6)):
        config = make_config(**SHORT, **{"gate.bias": bias})
        assert run_alone(config, tmp_path / name)
    for found, row in zip(
        rows_of(tmp_path / "tiny"), rows_of(tmp_path / "none"), strict=True
    ):
        for name in ("train_loss", "personal_accuracy", "global_accuracy"):
            if name in row:
                np.testing.assert_allclose(found[name], row[name], atol=1e-3)
