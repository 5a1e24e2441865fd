"""Learning of ONE layer from a round, against hand numbers and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_align, make_feedback, make_hyper, make_program
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.align.drift_detector import init_detector
from fedmoe_jax.align.learn import count_load, learn
from fedmoe_jax.types import Assignment

KEY = jax.random.key(0)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_count_load_counts_as_numpy_does(seed):
    rng = np.random.default_rng(seed)
    ids, slot = rng.integers(0, 7, (150, 4)), rng.random((150, 4)) < 0.7
    load = rng.integers(0, 100, (150, 4)).astype(np.float32)
    arrived = rng.random(150) < 0.9
    assignment = Assignment(jnp.asarray(ids), jnp.asarray(slot))
    got = count_load(make_feedback(load), jnp.asarray(arrived), assignment, 7)
    expected = np.zeros(7, np.float32)
    counted = slot & arrived[:, None]
    np.add.at(expected, ids[counted], load[counted])
    np.testing.assert_array_equal(got, expected)


# ---- a round of two clients


HYPER = make_hyper(
    fitness={"rate": 0.3, "idle_decay": 0.9, "prior": 0.5, "noise": 0.01},
    reaction={"slack": 0.1, "threshold": 0.5, "haste": 2.0, "rounds": 3, "evidence": 3},
)


def learn_once(
    reaction="none",
    kind="accuracy",
    evidence=3,
    arrived=(True, True),
    received=(True, True),
    chosen=((True, True), (True, True)),
    **feedback,
):
    """Clients 0 and 2 of three take part; its experts fail client 0."""
    slots = jnp.array([[0, 1], [2, 3]])
    assignment = Assignment(slots, jnp.ones((2, 2), bool))
    accuracy = jnp.array([[0.1, 0.1], [0.8, 0.8]])
    feedback = make_feedback(jnp.ones((2, 2)), accuracy=accuracy).replace(**feedback)
    well_known = init_detector(3, 4).replace(evidence=jnp.full((3, 4), evidence))
    align = make_align(
        *(3, 4),
        fitness=jnp.full((3, 4), 0.8),
        usage=jnp.full(4, 10.0),
        held=jnp.ones((3, 4), bool),
        times_held=jnp.ones((3, 4), jnp.int32),
        detector=well_known if reaction != "none" else {},
    )
    return learn(
        *(align, jnp.array([0, 2]), assignment),
        *(assignment.replace(slot=jnp.array(chosen)), feedback),
        *(jnp.array(arrived), jnp.array(received), jnp.ones(4), KEY),
        hyper=HYPER,
        static=make_program(
            **{"reaction.kind": reaction, "fitness.feedback": kind}
        ).static,
    )


def test_learn_by_hand():
    after = learn_once()
    idle = 0.9 * 0.8 + 0.1 * 0.5
    expected = [
        [0.7 * 0.8 + 0.3 * 0.1] * 2 + [idle] * 2,
        [idle] * 4,
        [idle] * 2 + [0.8] * 2,
    ]
    np.testing.assert_allclose(after.fitness, expected, rtol=1e-6)
    np.testing.assert_allclose(after.usage, [0.9 * 10 + 1] * 4, rtol=1e-6)
    assert after.held.tolist() == [[1, 1, 0, 0], [1] * 4, [0, 0, 1, 1]]
    assert after.times_held.tolist() == [[2, 2, 1, 1], [1] * 4, [1, 1, 2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("reaction", ["none", "reset", "hasten"])
def test_learn_ignores_the_feedback_of_updates_that_were_lost(reaction):
    lost = learn_once(reaction, arrived=(False, True))
    fitness = np.asarray(lost.fitness)
    # Client 0 held experts 0 and 1, of which nothing is known: their scores stay.
    np.testing.assert_array_equal(fitness[0, :2], np.float32([0.8, 0.8]))
    assert np.all(fitness[0, 2:] < 0.8)  # the others were idle
    other = learn_once(reaction, arrived=(False, True), accuracy=jnp.full((2, 2), 0.8))
    jax.tree.map(np.testing.assert_array_equal, lost, other)
    if reaction != "none":
        assert lost.detector.alarms == 0 and not np.any(lost.detector.suspicion)
        assert lost.detector.evidence[0].tolist() == [3, 3, 3, 3]


def test_learn_leaves_a_client_what_it_had_before_experts_that_never_came():
    lost = learn_once(arrived=(False, True), received=(False, True))
    assert lost.held.tolist() == [[1] * 4, [1] * 4, [0, 0, 1, 1]]
    assert lost.times_held.tolist() == [[2, 2, 1, 1], [1] * 4, [1, 1, 2, 2]]


def test_learn_ignores_experts_without_examples():
    after = learn_once(load=jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(after.fitness[0, :2], [0.59, 0.8], rtol=1e-6)


def test_learn_from_probes_of_experts_that_no_position_was_routed_to():
    """Expert 1 of client 0 has a load of 0, and its probe counts nevertheless."""
    probe = jnp.array([[jnp.log(2.0), jnp.log(4.0)], [jnp.nan, 0.0]])
    load = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    after = learn_once(kind="probe", load=load, probe=probe)
    held = [0.7 * 0.8 + 0.3 / 2, 0.7 * 0.8 + 0.3 / 4]
    np.testing.assert_allclose(after.fitness[0, :2], held, rtol=1e-6)
    # A loss that is no number is no evidence.
    np.testing.assert_allclose(after.fitness[2, 2:], [0.8, 0.86], rtol=1e-6)
    lost = learn_once(kind="probe", load=load, probe=probe, arrived=(False, True))
    np.testing.assert_array_equal(lost.fitness[0, :2], np.float32([0.8, 0.8]))


CHOICE = ((False, True), (True, False))  # expert 1 of 0 and 1, and expert 2 of 2 and 3


def test_learn_of_clients_that_choose_holds_what_they_have_chosen():
    load = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    after = learn_once(chosen=CHOICE, load=load)
    assert after.held.tolist() == [[0, 1, 0, 0], [1] * 4, [0, 0, 1, 0]]
    assert after.times_held.tolist() == [[1, 2, 1, 1], [1] * 4, [1, 1, 2, 1]]
    # What they have received and not chosen is neither idle nor known.
    idle = 0.9 * 0.8 + 0.1 * 0.5
    expected = [[0.8, 0.59, idle, idle], [idle] * 4, [idle, idle, 0.8, 0.8]]
    np.testing.assert_allclose(after.fitness, expected, rtol=1e-6)


def test_learn_from_probes_of_experts_that_a_client_has_not_chosen():
    probe, load = jnp.log(jnp.array([[4.0, 2.0], [2.0, 4.0]])), jnp.ones((2, 2))
    load = jnp.where(jnp.array(CHOICE), load, 0.0)
    after = learn_once(kind="probe", chosen=CHOICE, load=load, probe=probe)
    scores = [0.7 * 0.8 + 0.3 / 4, 0.7 * 0.8 + 0.3 / 2]
    np.testing.assert_allclose(after.fitness[0, :2], scores, rtol=1e-6)
    np.testing.assert_allclose(after.fitness[2, 2:], scores[::-1], rtol=1e-6)
    # Probed beside feedback from training, they have no score.
    both = learn_once(chosen=CHOICE, load=load, probe=probe)
    np.testing.assert_allclose(both.fitness[0, :2], [0.8, 0.59], rtol=1e-6)


# ---- what an alarm does to the scores


def test_learn_resets_the_scores_of_an_alarmed_client_alone():
    plain, after = learn_once(), learn_once("reset")
    assert after.detector.alarms == 1  # 0.8 - 0.1 - 0.1 > 0.5
    assert after.detector.haste_left.tolist() == [3, 0, 0]
    np.testing.assert_allclose(after.fitness[0], np.full(4, 0.5), atol=0.01)
    assert len(set(after.fitness[0].tolist())) == 4  # ties are broken
    np.testing.assert_array_equal(after.fitness[1:], plain.fitness[1:])
    np.testing.assert_array_equal(after.held, plain.held)


def test_learn_takes_no_alarm_from_a_pair_known_from_few_scores():
    after = learn_once("reset", evidence=2)
    assert after.detector.alarms == 0 and not np.any(after.detector.suspicion)
    assert after.detector.evidence[0].tolist() == [3, 3, 2, 2]
    forgotten = learn_once("reset").detector.evidence
    assert not np.any(forgotten[0]) and np.all(forgotten[2] >= 3)


def test_learn_hastens_the_scores_of_an_alarmed_client_by_hand():
    hyper_prior = float(HYPER.fitness.prior)
    plain, after = learn_once(), learn_once("hasten")
    idle = 0.9 * 0.8 + 0.1 * hyper_prior
    np.testing.assert_allclose(plain.fitness[0], [0.59, 0.59, idle, idle], rtol=1e-6)
    # two rounds in one: 0.49 of the old score, and 0.81 of an idle one
    held, idle = 0.49 * 0.8 + 0.51 * 0.1, 0.81 * 0.8 + 0.19 * hyper_prior
    np.testing.assert_allclose(after.fitness[0], [held, held, idle, idle], rtol=1e-6)
    np.testing.assert_allclose(after.fitness[1:], plain.fitness[1:], rtol=1e-6)
