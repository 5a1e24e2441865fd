"""A process of one's own, in whole rounds and in the evaluation after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import E, K, N, make_devices, plan_run, start_run, use_linear_model

from fedmoe_jax.base import Process
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.world import PROCESSES

pytestmark = pytest.mark.slow


def step_toy(state, keys, round, hyper):
    return state | {"odd": (round % 2).astype(jnp.float32)}


def apply_toy(state, view, hyper):
    upload = view.devices.upload / (1 + state["odd"])
    return view.replace(devices=view.devices.replace(upload=upload))


def count_rounds(state, cohort, outcome, late, hyper):
    return state | {"rounds": state["rounds"].at[cohort].add(1)}


TOY = Process(
    about="Every other round the links up are half as fast.",
    is_on=lambda config: config.num_rounds > 1,
    init=lambda keys, hyper, sizes: {
        "odd": jnp.zeros(()),
        "rounds": jnp.zeros(sizes.num_clients, jnp.int32),
    },
    step=step_toy,
    apply=apply_toy,
    after=count_rounds,
    metrics=lambda state: {"toy_odd": state["odd"]},
)


def roll_mixes(state, view, hyper):
    mix = jnp.roll(view.federation.label_mix, 1, axis=0)
    return view.replace(federation=view.federation.replace(label_mix=mix))


BARE = Process(
    about="Gives clients the label mixes of others, which evaluation alone reads.",
    is_on=lambda config: True,
    init=lambda keys, hyper, sizes: jnp.zeros(()),
    step=lambda state, keys, round, hyper: state,
    apply=roll_mixes,
)


def run():
    """Two rounds in which uploads take all of the time, and the evaluation after."""
    plan = plan_run(**{"devices.deadline": 1e9, "partition.kind": "shards"})
    devices = make_devices(N, memory=1e12, flops=1e12, download=1e12, upload=10.0)
    plan = plan._replace(federation=plan.federation.replace(devices=devices))
    program = use_linear_model(plan.program)
    program = program._replace(device_costs=program.costs)
    _, state, *inputs = start_run(plan, program)
    state, metrics = build_run_rounds(program)(state, *inputs)
    # All clients hold the same, so that they differ by their label mixes only.
    held = jnp.zeros((N, 1, E), bool).at[..., :K].set(True)
    counted = state.participation.replace(rounds=jnp.ones(N, jnp.int32))
    align = state.align.replace(held=held)
    moment = state.replace(align=align, participation=counted)
    return jax.device_get((state, metrics, build_evaluate(program)(moment, *inputs)))


def test_a_process_of_ones_own_is_one_record_and_one_row(monkeypatch):
    """And one of them has neither an `after` nor metrics."""
    _, metrics, found = run()
    monkeypatch.setitem(PROCESSES, "toy", TOY)
    monkeypatch.setitem(PROCESSES, "bare", BARE)
    state, toy_metrics, toy_found = run()
    assert set(state.world) == {"toy", "bare"}
    assert set(toy_metrics) - set(metrics) == {"toy_odd"}
    assert toy_metrics["toy_odd"].tolist() == [0, 1] and state.world["toy"]["odd"] == 1
    rounds = state.participation.rounds
    np.testing.assert_array_equal(state.world["toy"]["rounds"], rounds)
    seconds = toy_metrics["simulated_seconds"] / metrics["simulated_seconds"]
    np.testing.assert_allclose(seconds, [1, 2], rtol=1e-5)
    # Evaluation sees the data as the processes leave them.
    accuracy = found["client_accuracy"]
    rolled = np.roll(accuracy, 1)
    assert np.abs(rolled - accuracy).max() > 0.01
    np.testing.assert_allclose(toy_found["client_accuracy"], rolled, atol=1e-6)
