"""The change detector, against numbers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax.align.drift_detector import (
    hasten,
    init_detector,
    reset_fitness,
    residuals,
    watch,
)
from fedmoe_jax.align.learn import learn
from fedmoe_jax.cohort import Report
from fedmoe_jax.program import make_rules
from fedmoe_jax.types import AlignState, Assignment, Feedback, Hyper, Keys
from fedmoe_jax.world.outcome import MERGED, Outcome

NUMBERS = {"slack": 0.25, "threshold": 1.0, "rounds": 2.0}


@functools.partial(jax.jit, static_argnames="num_clients")
def watch_all(residual, observed, *, num_clients, **numbers):
    """Rounds [R, N] of residuals that everyone reports -> final, of every round."""
    client = jnp.arange(num_clients)

    def step(detector, seen):
        detector, alarm = watch(detector, client, *seen, **numbers)
        return detector, (alarm, detector)

    return jax.lax.scan(step, init_detector(num_clients, 1), (residual, observed))


def watch_series(residual, **numbers):
    """Alarms [R] bool of one client that is observed in every round."""
    column = jnp.asarray(residual, jnp.float32)[:, None]
    observed = jnp.ones(column.shape, bool)
    _, (alarm, _) = watch_all(column, observed, num_clients=1, **numbers)
    return np.asarray(alarm)[:, 0]


def test_residuals_by_hand():
    fitness = jnp.array([[0.5, 0.25, 1.0], [0.5, 0.5, 0.5], [0.75, 0.5, 0.0]])
    score = jnp.array([[0.25, 0.5, 0.0], [0.0, 0.0, 0.0], [jnp.nan, 1.0, jnp.inf]])
    counted = jnp.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    residual, observed = residuals(fitness, score, counted)
    # (0.25 - 0.25) / 2, nothing, and of the third only the second slot is finite.
    assert residual.tolist() == [0.0, 0.0, -0.5]
    assert observed.tolist() == [True, False, True]
    counted = counted.at[0, 2].set(True)
    np.testing.assert_allclose(residuals(fitness, score, counted)[0][0], 1 / 3)


def test_the_sum_by_hand():
    residual = jnp.array(
        [
            [0.75, 0.0, 0.75],
            [0.75, -5.0, 0.75],
            [0.5, 0.5, 9.0],
            [0.75, 0.5, 0.5],
            [0.0, 1.0, 0.0],
        ]
    )
    observed = jnp.ones((5, 3), bool).at[2, 2].set(False)
    last, (alarm, every) = watch_all(residual, observed, num_clients=3, **NUMBERS)
    # Exactly at the threshold is no alarm; below 0 the sum starts again from 0.
    assert every.suspicion.T.tolist() == [
        [0.5, 1.0, 0.0, 0.5, 0.25],
        [0.0, 0.0, 0.25, 0.5, 0.0],
        [0.5, 1.0, 1.0, 0.0, 0.0],
    ]
    assert alarm.T.tolist() == [
        [False, False, True, False, False],
        [False, False, False, False, True],
        [False, False, False, True, False],
    ]
    assert every.haste_left.T.tolist() == [
        [0.0, 0.0, 2.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 2.0],
        [0.0, 0.0, 0.0, 2.0, 1.0],
    ]
    assert every.alarms.tolist() == [0.0, 0.0, 1.0, 2.0, 3.0]
    assert last.alarms == 3.0 and last.alarms.dtype == jnp.float32


def test_who_is_not_in_the_cohort_keeps_its_suspicion_and_loses_haste():
    detector = init_detector(5, 1).replace(
        suspicion=jnp.full(5, 0.5), haste_left=jnp.array([3.0, 0.0, 0.5, 1.0, 0.0])
    )
    client, residual = jnp.array([3, 1, 4]), jnp.array([2.0, 0.5, 1.0])
    observed = jnp.ones(3, bool)
    after, alarm = watch(detector, client, residual, observed, **NUMBERS)
    assert after.suspicion.tolist() == [0.5, 0.75, 0.5, 0.0, 0.0]
    assert after.haste_left.tolist() == [2.0, 0.0, 0.0, 2.0, 2.0]
    assert alarm.tolist() == [False, False, False, True, True]
    assert after.alarms == 2.0


@pytest.mark.parametrize(
    ("shift", "slack", "threshold"), [(0.3, 0.05, 0.6), (0.9, 0.1, 0.5), (0.2, 0, 1.5)]
)
def test_a_step_is_detected_when_the_sum_says(shift, slack, threshold):
    quiet = 20
    delay = int(np.ceil(threshold / (shift - slack)))
    residual = [slack / 2] * quiet + [shift] * (delay + 1)
    alarm = watch_series(residual, slack=slack, threshold=threshold, rounds=3.0)
    assert np.flatnonzero(alarm)[0] == quiet + delay - 1


def test_noise_within_the_slack_never_alarms_but_without_slack_it_would():
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, 2000)
    quiet = watch_series(noise, slack=0.2, threshold=0.5, rounds=0.0)
    nervous = watch_series(noise, slack=0.0, threshold=0.5, rounds=0.0)
    assert not quiet.any() and nervous.any()


def test_only_alarmed_rows_are_reset():
    fitness = jnp.linspace(2.0, 3.0, 12).reshape(3, 4)
    alarm = jnp.array([True, False, True])
    fresh = jax.jit(reset_fitness)(jax.random.key(0), fitness, alarm, 0.5, 0.125)
    np.testing.assert_array_equal(fresh[1], fitness[1])
    reset = np.asarray(fresh)[[0, 2]]
    assert np.all(np.abs(reset - 0.5) <= 0.125)
    assert len(np.unique(reset)) == 8


def test_haste_by_hand():
    rate = jnp.array([0.25, 0.5, 1.0])
    np.testing.assert_allclose(hasten(rate, 1.0), rate, rtol=1e-6)
    np.testing.assert_allclose(hasten(rate, 2.0), [0.4375, 0.75, 1.0], rtol=1e-6)
    mixed = hasten(rate, jnp.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(mixed, [0.25, 0.875, 1.0], rtol=1e-6)


def test_haste_is_that_many_rounds_of_the_same_score():
    value = 0.9
    for _ in range(3):
        value = (1 - 0.2) * value + 0.2 * 0.1
    rate = hasten(jnp.float32(0.2), 3.0)
    np.testing.assert_allclose((1 - rate) * 0.9 + rate * 0.1, value, rtol=1e-6)


def test_runs_differ_under_vmap():
    residual = jnp.full((8, 1), 0.5)
    observed = jnp.ones((8, 1), bool)

    def count(threshold):
        numbers = NUMBERS | {"threshold": threshold}
        return watch_all(residual, observed, num_clients=1, **numbers)[0].alarms

    # Steps of 0.25: alarms after 2, 4 and 8 rounds.
    alarms = jax.vmap(count)(jnp.array([0.3, 0.9, 1.8]))
    assert alarms.tolist() == [4.0, 2.0, 1.0]


# ---- what an alarm does to the scores


def learn_once(kind, evidence=3):
    """Clients 0 and 2 of three take part; its experts fail client 0."""
    ones, slots = jnp.ones((2, 2)), jnp.array([[0, 1], [2, 3]])
    assignment = Assignment(slots, jnp.ones((2, 2), bool))
    accuracy = jnp.array([[0.1, 0.1], [0.8, 0.8]])
    feedback = Feedback(accuracy, ones, ones, ones, ones, None)
    outcome = Outcome(jnp.array([MERGED, MERGED]), None, None)
    report = Report(feedback, None, None, outcome, None, {}, {})
    well_known = init_detector(3, 4).replace(evidence=jnp.full((3, 4), evidence))
    align = AlignState(
        fitness=jnp.full((3, 4), 0.8),
        usage=jnp.zeros(4),
        held=jnp.ones((3, 4), bool),
        times_held=jnp.ones((3, 4), jnp.int32),
        detector=well_known if kind else {},
    )
    fields = dict.fromkeys(Hyper.__dataclass_fields__, jnp.float32(0))
    numbers = dict(slack=0.1, threshold=0.5, haste=2.0, rounds=3.0, evidence=3.0)
    world = {"reaction": {name: jnp.float32(x) for name, x in numbers.items()}}
    known = dict(fitness_rate=0.3, idle_decay=0.9, prior=0.5, noise=0.01)
    known = {name: jnp.float32(x) for name, x in known.items()}
    hyper = Hyper(**fields | known | {"own": {}, "world": world})
    config = default.get_config()
    rules = make_rules(config, 4)
    rules = rules._replace(world=rules.world._replace(reaction=kind))
    keys = Keys(jax.random.key(0), jax.random.key(1))
    load = jnp.ones(4)
    cohort = jnp.array([0, 2])
    return learn(align, cohort, assignment, report, load, hyper, rules, keys)


def test_an_alarm_resets_the_clients_scores_and_nobody_elses():
    plain, after = learn_once(""), learn_once("reset")
    assert after.detector.alarms == 1  # 0.8 - 0.1 - 0.1 > 0.5
    assert after.detector.haste_left.tolist() == [3, 0, 0]
    np.testing.assert_allclose(after.fitness[0], np.full(4, 0.5), atol=0.01)
    assert len(set(after.fitness[0].tolist())) == 4  # ties are broken
    np.testing.assert_array_equal(after.fitness[1:], plain.fitness[1:])
    np.testing.assert_array_equal(after.held, plain.held)


def test_a_pair_known_from_few_scores_raises_no_alarm():
    after = learn_once("reset", evidence=2)
    assert after.detector.alarms == 0 and not np.any(after.detector.suspicion)
    assert after.detector.evidence[0].tolist() == [3, 3, 2, 2]
    forgotten = learn_once("reset").detector.evidence
    assert not np.any(forgotten[0]) and np.all(forgotten[2] >= 3)


def test_an_alarm_hastens_the_clients_scores_by_hand():
    plain, after = learn_once(""), learn_once("hasten")
    np.testing.assert_allclose(plain.fitness[0], [0.59, 0.59, 0.72, 0.72], rtol=1e-6)
    # two rounds in one: 0.49 of the old score, and 0.81 of an idle one
    held, idle = 0.49 * 0.8 + 0.51 * 0.1, 0.81 * 0.8
    np.testing.assert_allclose(after.fitness[0], [held, held, idle, idle], rtol=1e-6)
    np.testing.assert_allclose(after.fitness[1:], plain.fitness[1:], rtol=1e-6)
