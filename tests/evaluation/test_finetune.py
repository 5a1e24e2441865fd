"""Accuracy after one more local round, against the round itself and a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SMALL,
    make_config,
    plan_run,
    run_alone,
    start_run,
    use_linear_model,
)

from fedmoe_jax.base import Route
from fedmoe_jax.client import build_client_update
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.evaluation.finetune import build_finetune_share, gather_input
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import replace
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.types import make_keys
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

TUNED = "personal_finetuned_accuracy"


def start_study(strategy, devices=1, **changes):
    """A run of ten clients of which one holds nothing and one never got through."""
    plan = plan_run(strategy=strategy, **{"evaluation.finetune": True} | changes)
    program = use_linear_model(plan.program)._replace(mesh=build_mesh(devices))
    run = start_run(plan, program)
    align, sizes = run.state.align, program.sizes
    rng = np.random.default_rng(0)
    order = rng.random(align.held.shape).argsort(axis=2)
    held = jnp.asarray(order < sizes.max_held).at[3].set(False)
    rounds = jnp.ones(sizes.num_clients, jnp.int32).at[jnp.array([3, 5])].set(0)
    state = run.state.replace(
        align=align.replace(held=held),
        participation=run.state.participation.replace(rounds=rounds),
    )
    return run._replace(state=state)


def finetune(run, rate):
    """Accuracies before and after fine-tuning."""
    program = run.program
    hyper = replace(run.hyper, evaluation={"finetune_rate": jnp.float32(rate)})
    before = build_evaluate(program)(run.state, run.federation, hyper)
    tune = jax.jit(spread(build_finetune_share(program), program.mesh))
    values = before["client_accuracy"][None]  # of V, the accuracy
    after = tune(run.state, run.federation, hyper, values)
    return jax.device_get((before, after))


def train_one(client, run, rate):
    """The inputs of ONE client and its update, in a local round as it would be now."""
    program, state = run.program, run.state
    hyper = replace(run.hyper, client={"learning_rate": jnp.float32(rate)})
    view = observe(state.world, run.federation, hyper, program.processes)
    inputs = gather_input(state, view, hyper, None, client, program)
    key = jax.random.fold_in(make_keys(state.key, state.round).train, client)
    # A client trains all that it holds, also where it has chosen it.
    strategy = program.strategy._replace(choose=None)
    update = build_client_update(program._replace(strategy=strategy))(
        state.params, inputs, run.federation, hyper, key
    )
    return inputs, update.delta


def answer_test(inputs, delta, held, run):
    """The classes of test images by ONE client's tuned model, of experts `held`."""
    program, federation = run.program, run.federation
    received = take_submodel(run.state.params, inputs.personal, held, 0)
    keep = lambda delta: delta[: held.shape[1]]
    experts = jax.tree.map(keep, delta["experts"])
    tuned = jax.tree.map(jnp.add, received, delta | {"experts": experts})
    batch = program.task.prepare(federation.test, federation.statistics)
    route = Route(program.sizes.num_active, program.strategy.mix)
    slots = held, jnp.ones(held.shape, bool)
    return program.model.apply(tuned, {}, batch, *slots, route, None)[0].argmax(1)


def tune_slowly(run, rate):
    """client -> its accuracy after its local round, label by label."""
    train = jax.jit(lambda client: train_one(client, run, rate))
    answer = jax.jit(lambda *model: answer_test(*model, run))
    federation, rows = jax.device_get((run.federation, run.state.align.held))
    stratum = federation.test_stratum

    def tune(client):
        inputs, delta = train(jnp.int32(client))
        held = np.flatnonzero(rows[client, 0])[None]
        slot = np.asarray(inputs.slot[0])
        assert held[0].tolist() == np.asarray(inputs.held[0])[slot].tolist()
        right = np.asarray(answer(inputs, delta, held)) == federation.test["y"]
        mix = federation.label_mix[client]
        return sum(mix[k] * right[stratum == k].mean() for k in np.flatnonzero(mix))

    return tune


@pytest.mark.parametrize(
    ("strategy", "devices", "rate"),
    [("greedy", 1, 0.1), ("greedy", 4, 0.1), ("fedavg", 1, 0.1), ("ifca", 1, 0.5)],
)
def test_finetuned_accuracy_equals_the_slow_loop(strategy, devices, rate):
    run = start_study(strategy, devices)
    before, after = finetune(run, rate)
    tune, clients = tune_slowly(run, rate), range(run.program.sizes.num_clients)
    slow = [before["client_accuracy"][c] if c in (3, 5) else tune(c) for c in clients]
    np.testing.assert_allclose(after[TUNED], np.mean(slow), atol=2e-3)
    worst = after["worst_decile_finetuned_accuracy"]
    np.testing.assert_allclose(worst, min(slow), atol=5e-3)
    assert abs(after[TUNED] - before["personal_accuracy"]) > 3e-3
    mix = np.delete(run.federation.label_mix, (3, 5), axis=0).sum(axis=0)
    strata = after["finetuned_stratum_accuracy"]
    trained = sum(np.delete(slow, (3, 5)))
    np.testing.assert_allclose(mix @ strata, trained, atol=2e-2)


@pytest.mark.parametrize("bias", [0.0, 3.0])
@pytest.mark.parametrize("strategy", ["greedy", "pfedmoe", "fedjets", "hfedmoe"])
def test_a_rate_of_next_to_nothing_changes_nothing(strategy, bias):
    run = start_study(strategy, **{"gate.bias": bias})
    before, after = finetune(run, 1e-30)
    np.testing.assert_allclose(after[TUNED], before["personal_accuracy"], atol=1e-3)
    worst = after["worst_decile_finetuned_accuracy"]
    np.testing.assert_allclose(worst, before["worst_decile_accuracy"], atol=2e-3)


def test_a_sample_of_clients_is_tuned():
    run = start_study("fedavg")
    static = replace(run.program.static, evaluation={"clients": 4})
    run = run._replace(program=run.program._replace(static=static))
    _, after = finetune(run, 1e-30)
    whole, _ = finetune(start_study("fedavg"), 1e-30)
    chosen = np.array(run.federation.sample_order)[:4]
    mean = whole["client_accuracy"][chosen].mean()
    np.testing.assert_allclose(after[TUNED], mean, atol=1e-3)


PROBES = {"fitness.feedback": "probe", "fitness.probe_share": 0.3}


@pytest.mark.parametrize("changes", [{}, PROBES])
def test_training_alone_is_tuned_by_its_own_next_round(changes, tmp_path):
    """All clients of `local` train in every round, as they do when they are tuned."""
    few = SMALL | {"eval_every": 1, "cohort_size": 4, "checkpoint.every": 1} | changes
    fields = few | {"strategy": "local", "evaluation.finetune": True}
    assert run_alone(make_config(**fields | {"num_rounds": 2}), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert TUNED not in rows[0] and "worst_decile_finetuned_accuracy" in rows[1]
    assert run_alone(make_config(**fields | {"num_rounds": 3}), tmp_path / "run")
    longer = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert longer[1][TUNED] == rows[1][TUNED]
    expected = longer[2]["personal_accuracy"]
    np.testing.assert_allclose(rows[1][TUNED], expected, atol=2e-3)
    assert longer[2][TUNED] != longer[2]["personal_accuracy"]
