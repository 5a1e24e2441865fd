"""The change detector, against numbers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.align.drift_detector import (
    hasten,
    init_detector,
    reset_fitness,
    residuals,
    watch,
)

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


def test_watch_by_hand():
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


def test_watch_keeps_the_suspicion_of_others_and_lowers_their_haste():
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
def test_watch_detects_a_step_when_the_sum_says(shift, slack, threshold):
    quiet = 20
    delay = int(np.ceil(threshold / (shift - slack)))
    residual = [slack / 2] * quiet + [shift] * (delay + 1)
    alarm = watch_series(residual, slack=slack, threshold=threshold, rounds=3.0)
    assert np.flatnonzero(alarm)[0] == quiet + delay - 1


def test_watch_never_alarms_within_the_slack_but_would_without_it():
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, 2000)
    quiet = watch_series(noise, slack=0.2, threshold=0.5, rounds=0.0)
    nervous = watch_series(noise, slack=0.0, threshold=0.5, rounds=0.0)
    assert not quiet.any() and nervous.any()


def test_reset_fitness_of_alarmed_rows_only():
    fitness = jnp.linspace(2.0, 3.0, 12).reshape(3, 4)
    alarm = jnp.array([True, False, True])
    fresh = jax.jit(reset_fitness)(jax.random.key(0), fitness, alarm, 0.5, 0.125)
    np.testing.assert_array_equal(fresh[1], fitness[1])
    reset = np.asarray(fresh)[[0, 2]]
    assert np.all(np.abs(reset - 0.5) <= 0.125)
    assert len(np.unique(reset)) == 8


def test_hasten_by_hand():
    rate = jnp.array([0.25, 0.5, 1.0])
    np.testing.assert_allclose(hasten(rate, 1.0), rate, rtol=1e-6)
    np.testing.assert_allclose(hasten(rate, 2.0), [0.4375, 0.75, 1.0], rtol=1e-6)
    mixed = hasten(rate, jnp.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(mixed, [0.25, 0.875, 1.0], rtol=1e-6)


def test_hasten_is_that_many_rounds_of_the_same_score():
    value = 0.9
    for _ in range(3):
        value = (1 - 0.2) * value + 0.2 * 0.1
    rate = hasten(jnp.float32(0.2), 3.0)
    np.testing.assert_allclose((1 - rate) * 0.9 + rate * 0.1, value, rtol=1e-6)


def test_watch_under_vmap_tells_runs_apart():
    residual = jnp.full((8, 1), 0.5)
    observed = jnp.ones((8, 1), bool)

    def count(threshold):
        numbers = NUMBERS | {"threshold": threshold}
        return watch_all(residual, observed, num_clients=1, **numbers)[0].alarms

    # Steps of 0.25: alarms after 2, 4 and 8 rounds.
    alarms = jax.vmap(count)(jnp.array([0.3, 0.9, 1.8]))
    assert alarms.tolist() == [4.0, 2.0, 1.0]
