"""The inputs of a cohort, its conditions and its traffic."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    K,
    N,
    choose,
    make_evidence,
    make_program,
    plan_run,
    see_calm,
    send_inputs,
    start,
    use_linear_model,
)

from fedmoe_jax.broadcast import gather_evidence, plan_traffic
from fedmoe_jax.evaluation.gate_bias import bias_clients
from fedmoe_jax.probe import find_hold_key
from fedmoe_jax.types import Assignment
from fedmoe_jax.world.step import observe


@pytest.mark.parametrize(
    ("kind", "numbers", "probed"),
    [("accuracy", 5, None), ("probe", 6, [4 * 3, 4 * 2])],
)
def test_plan_traffic_of_probes_by_hand(kind, numbers, probed):
    """Two layers, in which two clients hold 2 + 1 and 1 + 1 experts; batches of 4."""
    program = make_program(**{"fitness.feedback": kind})
    program = program._replace(sizes=program.sizes._replace(num_layers=2))
    slot = jnp.array([[[1, 1], [1, 0]], [[1, 0], [1, 0]]], bool)
    held = jnp.broadcast_to(jnp.arange(2), slot.shape)
    evidence = make_evidence(client=jnp.arange(2), capacity=jnp.full(2, 2))
    found = plan_traffic(
        *(evidence, Assignment(held, slot), None, jnp.ones(2, bool), None, program)
    )
    assert found.reported.tolist() == [numbers * 3, numbers * 2]
    assert found.held.tolist() == [1.5, 1]
    assert (found.probed if probed is None else found.probed.tolist()) == probed


def test_plan_traffic_of_cover_by_hand():
    """A client that holds 2 + 1 experts of two layers asks for 3 + 2, of 4."""
    program = make_program(**{"gate.bias": 1.0})
    program = program._replace(sizes=program.sizes._replace(num_layers=2))
    slot, asked = jnp.array([[[1, 1], [1, 0]]], bool), jnp.arange(4)[None, None]
    asked = asked < jnp.array([[[3], [2]]])
    held = jnp.broadcast_to(jnp.arange(2), slot.shape)
    evidence = make_evidence(client=jnp.arange(1), capacity=jnp.full(1, 2))
    wish = Assignment(held, slot, bias=jnp.zeros(slot.shape), asked=asked)
    found = plan_traffic(*(evidence, wish, None, jnp.ones(1, bool), None, program))
    assert found.received.tolist() == [5 / 2]
    assert found.reported.tolist() == [5 * 5] and found.biases.tolist() == [5]
    assert found.held.tolist() == found.trained.tolist() == [3 / 2]


@pytest.mark.slow
def test_gather_evidence_has_noisy_fitness_of_the_round_in_training_and_evaluation():
    plan = plan_run(**{"privacy.selection": 1.0, "gate.bias": 2.0})
    run = start(plan, use_linear_model(plan.program))
    cohort, everyone = jnp.array([1, 4]), jnp.arange(N)
    gather = lambda state, clients: (
        gather_evidence(
            *(state, see_calm(run), clients, state.belief, run.hyper, run.program)
        ).fitness
    )
    noisy, late = gather(run.state, cohort), run.state.replace(round=jnp.int32(1))
    assert (jnp.abs(noisy - run.state.align.fitness[cohort]) > 1e-3).all()
    np.testing.assert_array_equal(noisy, gather(run.state, everyone)[cohort])
    assert (gather(late, cohort) != noisy).all()
    bias = bias_clients(run.state, see_calm(run), run.hyper, run.program)
    best = gather(run.state, everyone).argmax(2)
    np.testing.assert_array_equal(bias.argmax(2), best)


@pytest.mark.parametrize("kind", ["loss", "probe"])
def test_broadcast_sends_the_key_of_what_is_held_out_to_those_that_probe(kind):
    plan = plan_run(**{"fitness.feedback": kind})
    run = start(plan, use_linear_model(plan.program))
    cohort = jnp.array([1, 2, 3, 5])
    held = jnp.zeros((4, K), jnp.int32), jnp.ones((4, K), bool)
    send = lambda round: (
        send_inputs(
            run, run.state.replace(round=jnp.int32(round)), cohort, *held
        ).hold_key
    )
    if kind == "loss":
        assert send(0) is None
    else:
        assert jnp.all(send(0) == send(7)) and jnp.all(send(0)[1:] != send(0)[0])
        assert send(0)[3] == find_hold_key(run.state.key, jnp.int32(5))


@pytest.mark.slow
def test_broadcast_distorts_the_images_of_drifting_clients_of_the_cohort():
    plan = plan_run(cohort_size=3)
    source = np.array([0, 2, 1, *range(3, N)], np.int32)
    plan = plan._replace(federation=plan.federation.replace(drift_source=source))
    run = start(plan, use_linear_model(plan.program))
    cohort = jnp.array([0, 2, 3])

    def send(**world):
        world = {name: jnp.float32(value) for name, value in world.items()}
        view = observe(world, run.federation, run.hyper, choose(*world))
        held = jnp.zeros((3, K), jnp.int32), jnp.ones((3, K), bool)
        return send_inputs(run, run.state, cohort, *held, view)

    assert send(images=30).distortion.tolist() == [0, 30, 0]
    assert send(labels=1).distortion is None
