"""Drift of labels and images, against numbers by hand and slow NumPy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import choose, make_devices, make_federation
from hypothesis import given, settings

from fedmoe_jax.types import Lists
from fedmoe_jax.world.drift import (
    draw_drift_sources,
    move_examples,
    progress,
)
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

N, M, L = 7, 32, 3
move = jax.jit(move_examples)


def make_clients(sizes, seed=0):
    """Rows of distinct examples from 1 on, so that 0 is padding only."""
    rng = np.random.default_rng(seed)
    owned = np.arange(M)[None] < np.array(sizes)[:, None]
    index = np.zeros((len(sizes), M), np.int32)
    index[owned] = 1 + rng.permutation(sum(sizes))
    mix = rng.dirichlet(np.ones(L), len(sizes)).astype(np.float32)
    return index, np.array(sizes, np.int32), mix


def move_slowly(index, size, mix, drift_source, moved):
    """The exchange as lists, one client at a time."""
    rows = [list(row[:n]) for row, n in zip(index, size, strict=True)]
    keep = [
        int(np.ceil(np.float32(1 - np.float32(moved)) * np.float32(n))) for n in size
    ]
    new, mixes = np.zeros_like(index), np.zeros_like(mix)
    for c, s in enumerate(drift_source):
        row = rows[c][: keep[c]] + rows[s][keep[s] :]
        new[c, : len(row)] = row
        taken = size[s] - keep[s]
        mixes[c] = (keep[c] * mix[c] + taken * mix[s]) / len(row)
    return new, (new > 0).sum(1), mixes


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.1, 0), (0.2, 2), (0.55, 6), (1.0, 10)]
)
def test_draw_drift_sources_forms_one_cycle(share, count):
    drift_source = draw_drift_sources(np.random.default_rng(3), 10, share)
    assert drift_source.dtype == np.int32
    drifting = np.flatnonzero(drift_source != np.arange(10))
    assert len(drifting) == count
    if count:
        walk = [drifting[0]]
        while drift_source[walk[-1]] != walk[0]:
            walk.append(drift_source[walk[-1]])
        assert sorted(walk) == drifting.tolist()


def test_draw_drift_sources_sends_clients_equally_often_towards_every_other():
    rng = np.random.default_rng(5)
    pairs = np.zeros((4, 4))
    for _ in range(2000):
        pairs[np.arange(4), draw_drift_sources(rng, 4, 0.75)] += 1 / 2000
    np.testing.assert_allclose(np.diag(pairs), 0.25, atol=0.04)
    np.testing.assert_allclose(pairs[~np.eye(4, dtype=bool)], 0.25, atol=0.04)


@pytest.mark.parametrize(
    ("start", "rounds", "expected"),
    [
        (2.0, 4.0, [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        (3.0, 1.0, [0, 0, 0, 1, 1, 1, 1]),
        (0.0, 2.0, [0.5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_progress_by_hand(start, rounds, expected):
    schedule = jax.jit(jax.vmap(progress, in_axes=(0, None, None)))
    moved = schedule(jnp.arange(7), start, rounds)
    assert moved.dtype == jnp.float32
    np.testing.assert_array_equal(moved, np.float32(expected))


@pytest.mark.parametrize("rounds", [3.0, 7.0, 49.0])
def test_progress_ends_at_exactly_one(rounds):
    assert progress(jnp.int32(9 + rounds), 10.0, rounds) == 1.0
    assert progress(jnp.int32(8 + rounds), 10.0, rounds) < 1.0


# --- labels


def test_move_examples_by_hand():
    index = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
    mix = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    drift_source = jnp.array([1, 0, 2])
    new, size, mix = move(index, jnp.array([4, 2, 3]), mix, drift_source, 0.5)
    assert new.tolist() == [[1, 2, 6, 0], [5, 3, 4, 0], [7, 8, 9, 0]]
    assert size.tolist() == [3, 3, 3]
    np.testing.assert_allclose(mix, [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.5, 0.5]])


clients = st.lists(st.integers(1, M), min_size=N, max_size=N)
shares = st.floats(0, 1, width=32)


@given(clients, shares, shares, st.integers(0, 9))
@settings(max_examples=60)
def test_move_examples_leaves_every_example_one_owner(sizes, share, moved, seed):
    index, size, mix = make_clients(sizes)
    drift_source = draw_drift_sources(np.random.default_rng(seed), N, share)
    new, new_size, new_mix = map(
        np.asarray, move(index, size, mix, drift_source, moved)
    )
    assert new.shape == index.shape and new.dtype == new_size.dtype == np.int32
    assert new_size.max() <= max(sizes) and new_size.min() >= 1
    owned = np.arange(M)[None] < new_size[:, None]
    assert sorted(new[owned]) == list(range(1, sum(sizes) + 1))
    assert not new[~owned].any()
    np.testing.assert_allclose(new_mix.sum(1), 1, rtol=1e-5)
    slow = move_slowly(index, size, mix, drift_source, moved)
    np.testing.assert_array_equal(new, slow[0])
    np.testing.assert_array_equal(new_size, slow[1])
    np.testing.assert_allclose(new_mix, slow[2], rtol=1e-5, atol=1e-6)
    same = drift_source == np.arange(N)
    np.testing.assert_array_equal(new[same], index[same])
    np.testing.assert_array_equal(new_mix[same], mix[same])


@given(clients, st.integers(0, 9))
@settings(max_examples=20)
def test_move_examples_is_exact_at_both_ends(sizes, seed):
    start = make_clients(sizes)
    drift_source = draw_drift_sources(np.random.default_rng(seed), N, 1.0)
    for fresh, old in zip(move(*start, drift_source, 0.0), start, strict=True):
        np.testing.assert_array_equal(fresh, old)
    for fresh, old in zip(move(*start, drift_source, 1.0), start, strict=True):
        np.testing.assert_array_equal(fresh, old[drift_source])


@pytest.mark.parametrize("moved", [2.0**-24, 0.1, 1 / 3, 0.7, 1 - 2.0**-24])
def test_move_examples_never_lets_a_row_overflow_by_rounding(moved):
    """The proof of the bound needs of float32 that k grows by 0 or 1."""
    size = jnp.arange(1, 60001)
    index, mix = jnp.zeros((60000, 1), jnp.int32), jnp.ones((60000, 1))
    # Everyone takes from the client with one more: k(n) + (n + 1) - k(n + 1).
    drift_source = jnp.roll(jnp.arange(60000), -1)
    grown = np.asarray(move(index, size, mix, drift_source, moved)[1][:-1])
    assert set(np.unique(grown - np.arange(1, 60000))) <= {0, 1}


def test_move_examples_under_vmap():
    start = jax.tree.map(jnp.asarray, make_clients([5, 9, 2, 7, 32, 1, 1]))
    drift_source = draw_drift_sources(np.random.default_rng(0), N, 1.0)
    moved = jnp.array([0.0, 0.4, 1.0])
    many = jax.vmap(lambda share: move_examples(*start, drift_source, share))(moved)
    for run, share in enumerate(moved):
        one = move(*start, drift_source, share)
        jax.tree.map(lambda a, b, r=run: np.testing.assert_allclose(a[r], b), many, one)


# --- images


def look(**state):
    """The view of three clients, of which the first two exchange their data."""
    federation = make_federation(
        devices=make_devices(3),
        index=jnp.array([[1, 2], [3, 0], [4, 5]]),
        size=jnp.array([2, 1, 2]),
        label_mix=jnp.eye(3),
        drift_source=jnp.array([1, 0, 2]),
        own_test=Lists(jnp.array([[6, 0], [7, 8], [9, 0]]), jnp.array([1, 2, 0])),
    )
    return observe(jax.tree.map(jnp.float32, state), federation, None, choose(*state))


def test_apply_labels_shows_the_examples_that_clients_own_by_now():
    before, after = look(labels=0).federation, look(labels=1).federation
    assert before.index.tolist() == [[1, 2], [3, 0], [4, 5]]
    assert after.index.tolist() == [[3, 0], [1, 2], [4, 5]]
    assert after.size.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(after.label_mix, np.eye(3)[[1, 0, 2]])


def test_apply_labels_moves_own_tests_with_what_is_trained_on():
    before, half, after = (look(labels=x).federation.own_test for x in (0, 0.5, 1))
    assert before.index.tolist() == [[6, 0], [7, 8], [0, 0]]
    assert before.size.tolist() == [1, 2, 0]
    # One keeps its only example and takes the second's last, which takes none.
    assert half.index.tolist() == [[6, 8], [7, 0], [0, 0]]
    assert after.index.tolist() == [[7, 8], [6, 0], [0, 0]]
    assert after.size.tolist() == [2, 1, 0]


def test_apply_images_distorts_those_of_clients_that_drift():
    assert look(images=30).distortion.tolist() == [30, 30, 0]
    assert look(labels=1).distortion is None
