"""The units that a client keeps within its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.pruning.choose import Group, choose_units, keep_best, rotate

OFF = dict(floor=jnp.float32(1e-3), rotation=jnp.float32(0.0))
WHEN = dict(client=jnp.int32(3), round=jnp.int32(2))


def make_groups(*rows, seed=0):
    """Groups of (layers, units, cost of a unit) with random scores."""
    groups = []
    for number, (layers, count, cost) in enumerate(rows):
        score = (jax.nn.sigmoid(draw(layers, count, seed=seed + number)) + 0.1) / 1.2
        groups.append(Group(score, jnp.ones(layers, bool), jnp.float32(cost)))
    return groups


def cost_of(groups, masks):
    each = zip(groups, masks, strict=True)
    return sum(float(mask.sum() * group.cost) for group, mask in each)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.integers(0, 5))
def test_choose_units_is_one_threshold_within_the_room(share, seed):
    """NumPy's prune: sort all units, keep the longest prefix that fits."""
    groups = make_groups((2, 5, 3.0), (1, 7, 2.0), seed=seed)
    room = share * 44.0
    masks = choose_units(groups, jnp.float32(room), **OFF, **WHEN)
    score = np.concatenate([np.asarray(g.score).ravel() for g in groups])
    cost = np.concatenate([np.full(g.score.size, float(g.cost)) for g in groups])
    best = np.zeros(len(score), bool)  # one of each layer stays
    for first, last in ((0, 5), (5, 10), (10, 17)):
        best[first + score[first:last].argmax()] = True
    order = np.lexsort((-score, ~best))
    fits = np.zeros(len(score), bool)
    fits[order] = np.cumsum(cost[order]) <= room * (1 + 1e-5)
    found = np.concatenate([np.asarray(mask).ravel() for mask in masks])
    np.testing.assert_array_equal(found, fits | best)
    assert cost_of(groups, masks) <= max(room * (1 + 1e-5), 8.0)


@pytest.mark.slow
def test_choose_units_keeps_nothing_of_what_the_client_does_not_hold():
    groups = [make_groups((3, 4, 1.0))[0]._replace(valid=jnp.array([1, 0, 1], bool))]
    (mask,) = choose_units(groups, jnp.float32(100.0), **OFF, **WHEN)
    np.testing.assert_array_equal(mask.sum(1), [4, 0, 4])


@pytest.mark.slow
def test_choose_units_keeps_the_floor_where_it_does_not_fit():
    groups = make_groups((2, 10, 1.0))
    (mask,) = choose_units(
        groups,
        jnp.float32(-5.0),
        floor=jnp.float32(0.3),
        rotation=jnp.float32(0),
        **WHEN,
    )
    np.testing.assert_array_equal(mask.sum(1), [3, 3])
    best = jnp.argsort(-groups[0].score, axis=1)[:, :3]
    for row, order in zip(np.asarray(mask), np.asarray(best), strict=True):
        assert row[order].all()


def test_keep_best_rounds_up():
    score = jnp.array([0.1, 0.4, 0.2, 0.3])
    for floor, count in ((0.01, 1), (0.25, 1), (0.26, 2), (1.0, 4)):
        assert int(keep_best(score, jnp.float32(floor)).sum()) == count


def test_rotate_gives_every_unit_its_turn():
    """In 1 / share rounds each unit is in the window of each client once."""
    turns = sum(
        np.asarray(rotate(20, jnp.float32(0.2), jnp.int32(7), jnp.int32(t)), int)
        for t in range(5)
    )
    np.testing.assert_array_equal(turns, 1)
    assert not bool(rotate(20, jnp.float32(0.0), jnp.int32(7), jnp.int32(3)).any())


def test_rotate_covers_all_units_with_enough_clients_in_one_round():
    windows = [
        np.asarray(rotate(10, jnp.float32(0.3), jnp.int32(client), jnp.int32(0)))
        for client in range(8)
    ]
    assert np.stack(windows).sum(0).min() >= 1
