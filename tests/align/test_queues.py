"""Virtual queues: trajectories by hand, what they promise, what tiers may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.align.queues import (
    TierPressure,
    find_top,
    init_tiers,
    lift_tiers,
    serve_clients,
    serve_tiers,
    take_top,
)
from fedmoe_jax.types import Assignment

# ---- clients


def test_serve_clients_by_hand():
    """Three clients, a floor of a half, cohorts of two of which one is lost once."""
    queue = jnp.zeros(3)
    rounds = [
        ((0, 1), (True, True), (0.0, 0.0, 0.5)),
        ((0, 1), (True, False), (0.0, 0.5, 1.0)),
        ((1, 2), (True, True), (0.5, 0.0, 0.5)),
        ((1, 2), (False, True), (1.0, 0.5, 0.0)),
    ]
    for cohort, arrived, expected in rounds:
        queue = serve_clients(queue, jnp.array(cohort), jnp.array(arrived), 0.5)
        np.testing.assert_allclose(queue, expected)


def test_a_queue_bounds_what_is_missing_whatever_happens():
    """mean x >= floor - Z / T, for any cohorts and losses at every T."""
    rng, floor = np.random.default_rng(0), np.float32(0.37)
    queue, count = jnp.zeros(6), np.zeros(6)
    for done in range(1, 60):
        cohort, arrived = rng.permutation(6)[:2], rng.random(2) < 0.8
        count[cohort] += arrived
        queue = serve_clients(queue, jnp.array(cohort), jnp.array(arrived), floor)
        assert (queue >= 0).all()
        assert (count / done >= floor - queue / done - 1e-5).all()
    assert float(queue.max()) > 1  # two places do not do for 6 x 0.37


# ---- the experts of high value


@pytest.mark.parametrize(
    ("value", "local", "top"),
    [
        ([0.1, 0.9, 0.5, 0.7], 0, [1, 3]),
        ([0.1, 0.9, 0.5], 0, [1, 2]),  # rounded up
        ([0.5, 0.5, 0.5, 0.5], 0, [0, 1]),  # of equals the first
        ([0.1, 0.2, 0.3, 0.9], 1, [1, 2]),  # the last one stays with the clients
        ([0.4, 0.9], 2, []),
    ],
)
def test_find_top_by_hand(value, local, top):
    assert np.flatnonzero(find_top(jnp.array(value), local)).tolist() == top


FITNESS = jnp.array([0.2, 0.6, 0.5, 0.9, 0.3])
TOP = jnp.array([True, False, True, False, True])


@pytest.mark.parametrize(
    ("held", "slots", "queue", "local", "expected"),
    [
        ([3, 1], 2, 0.3, 0, [3, 2]),  # gives up 0.6 less 0.5, V = 2
        ([3, 1], 2, 0.19, 0, [3, 1]),
        ([3, 4], 2, 9.0, 0, [3, 4]),  # has one
        ([3, 4], 1, 0.81, 0, [2, 4]),  # the other slot does not count
        ([3, 4], 1, 0.79, 0, [3, 4]),
        ([4, 1], 2, 0.0, 0, [4, 1]),
        ([1, 3], 2, 9.0, 2, [2, 3]),  # 3 and 4 stay with the client
        ([3, 3], 1, 9.0, 2, [3, 3]),
    ],
)
def test_take_top_by_hand(held, slots, queue, local, expected):
    top = TOP & (jnp.arange(5) < 5 - local)
    slot = jnp.arange(2) < slots
    own = jnp.array(held), slot, FITNESS, jnp.float32(queue), top
    assert take_top(*own, jnp.float32(2), local).tolist() == expected


def test_take_top_needs_a_queue_even_where_nothing_is_given_up():
    fitness = jnp.array([0.9, 0.1])
    own = jnp.array([1]), jnp.array([True]), fitness
    swap = lambda queue: take_top(*own, queue, jnp.array([True, False]), 1.0, 0)
    assert swap(0.0).tolist() == [1] and swap(1e-3).tolist() == [0]


def test_lift_tiers_keeps_slots_distinct_and_changes_pressed_tiers_alone():
    rng = np.random.default_rng(1)
    held = rng.random((40, 6)).argsort(1)[:, :3].astype(np.int32)
    capacity = rng.integers(1, 4, 40)
    slot = np.arange(3)[None] < capacity[:, None]
    fitness = jnp.asarray(rng.random((40, 6)), jnp.float32)
    top = jnp.arange(6) < 3
    pressure = TierPressure(queue=jnp.array([0.0, 5.0, 0.0]), top=top)
    before = Assignment(jnp.array(held), jnp.array(slot), jnp.ones(40))
    own = fitness, jnp.array(capacity), pressure
    after = lift_tiers(before, *own, jnp.float32(1), 0)
    changed = (np.asarray(after.held) != held).any(axis=1)
    lacks = ~((held < 3) & slot).any(axis=1)
    np.testing.assert_array_equal(changed, lacks & (capacity == 2))
    assert changed.any() and (lacks & ~changed).any()
    for ids, valid in zip(np.asarray(after.held), slot, strict=True):
        assert len(set(ids[valid])) == valid.sum()
    assert after.slot is before.slot and after.calibration is before.calibration


# ---- tiers


def test_serve_tiers_by_hand():
    """Three tiers; of the third nobody arrives."""
    held = jnp.array([[0, 1], [1, 0], [2, 1], [1, 2], [0, 1]])
    slot = jnp.array([[1, 0], [1, 0], [1, 1], [1, 1], [1, 1]], bool)
    capacity = jnp.array([1, 1, 2, 2, 3])
    arrived = jnp.array([True, True, False, True, False])
    serve = jax.jit(
        lambda tiers: serve_tiers(
            tiers,
            Assignment(held, slot),
            capacity,
            arrived,
            jnp.array([True, False, False]),
            0.75,
        )
    )
    tiers = serve(init_tiers(3))
    # Half of tier 1 has expert 0; of tier 2 the one that has arrived has not.
    np.testing.assert_allclose(tiers.queue, [0.25, 0.75, 0.0])
    assert tiers.rounds.tolist() == [1, 1, 0] and tiers.served.tolist() == [0.5, 0, 0]
    again = serve(tiers)
    np.testing.assert_allclose(again.queue, [0.5, 1.5, 0.0])
    assert again.rounds.dtype == jnp.int32 and again.served.tolist() == [1.0, 0, 0]
