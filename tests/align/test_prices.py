"""Prices of experts: by hand, by finite differences, and at the dual's optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.align.prices import (
    Bounds,
    approach_prices,
    count_marginal,
    excess,
    find_prices,
    find_span,
    settle_prices,
    stop_at_zero,
    sum_load,
)
from fedmoe_jax.types import Assignment


def make_bounds(low, high, weight=1.0, clients=10, experts=2):
    row = lambda value, size: np.full(size, value, np.float32)
    return Bounds(row(weight, clients), row(low, experts), row(high, experts))


def test_sum_load_counts_valid_slots_by_their_weight():
    held, slot = np.array([[1, 0], [2, 1]]), np.array([[True, True], [True, False]])
    count = jax.jit(sum_load, static_argnums=2)
    load = count(Assignment(held, slot), np.float32([10, 3]), 4)
    assert load.tolist() == [10, 10, 3, 0]


def test_find_span_is_positive_where_all_scores_are_equal():
    assert find_span(np.float32([[0.5, -1.5], [1.0, 0.0]])) == 2.5
    assert find_span(np.ones((2, 3), np.float32)) > 0


def test_excess_by_hand():
    bounds = Bounds(
        np.ones(1), np.full(7, 2.0, np.float32), np.full(7, 4.0, np.float32)
    )
    price = np.float32([1, 1, -1, -1, 0, 0, 0])
    load = np.float32([5, 3, 3, 1, 5, 3, 1])
    # Above 0 the upper bound is wanted, below it the lower, at 0 any between.
    assert excess(price, load, bounds).tolist() == [1, -1, 1, -1, 1, 0, -1]


def test_stop_at_zero_where_the_price_would_change_its_sign():
    price, moved = np.float32([1, 1, -1, -1, 0]), np.float32([-2, 3, 1, -2, -4])
    assert stop_at_zero(price, moved).tolist() == [0, 3, 0, -2, -4]


def soften(scores, weight, softness, price, share):
    """Loads [E] of clients that hold `share` [C] experts each, in double precision."""
    net = scores - weight[:, None] * price
    low, high = net.min(1) - 10, net.max(1) + 10
    for _ in range(100):
        middle = (low + high) / 2
        held = 1 / (1 + np.exp(-(net - middle[:, None]) / softness))
        too_many = held.sum(1) > share
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    return weight @ held


@pytest.mark.slow
def test_count_marginal_gives_the_slope_of_softened_loads():
    rng = np.random.default_rng(0)
    scores, weight = rng.random((7, 5)), rng.uniform(1, 3, 7)
    capacity, softness = np.int32([1, 2, 3, 1, 2, 3, 2]), 0.2
    found = jax.jit(count_marginal, static_argnames="max_held")(
        *(jnp.float32(scores), capacity, jnp.float32(weight), softness), max_held=3
    )
    load, slope = map(np.asarray, found)
    ranked = -np.sort(-scores, axis=1)
    rows = np.arange(7)
    hard = scores >= ranked[rows, capacity - 1][:, None]
    np.testing.assert_allclose(load, weight @ hard, rtol=1e-6)
    middle = (ranked[rows, capacity - 1] + ranked[rows, capacity]) / 2
    share = (1 / (1 + np.exp(-(scores - middle[:, None]) / softness))).sum(1)
    loads = lambda price: soften(scores, weight, softness, price, share)
    steps = 1e-5 * np.eye(5)
    numeric = [(loads(-step) - loads(step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(slope, np.transpose(numeric), rtol=1e-3, atol=1e-3)
    # All prices may rise together without any change.
    np.testing.assert_allclose(slope.sum(1), 0, atol=1e-4)


# Ten clients would rather have expert 0, each by a tenth more than the one before.
EAGER = np.stack([np.arange(1, 11) / 10, np.zeros(10)], 1).astype(np.float32)
ONE = np.ones(10, np.int32)


@functools.partial(jax.jit, static_argnums=3)
def compiled(scores, capacity, bounds, max_held):
    near = approach_prices(scores, capacity, bounds, max_held)
    settled = settle_prices(near, scores, capacity, bounds, max_held)
    return near, settled, find_prices(scores, capacity, bounds, max_held)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, 4.0])
@pytest.mark.parametrize(("low", "high"), [(0, 7), (3, 10), (5, 5)])
def test_find_prices_by_hand(low, high, weight):
    """The clients of largest preference hold expert 0, as many as may."""
    bounds = make_bounds(low * weight, high * weight, weight)
    near, settled, price = compiled(EAGER, ONE, bounds, 1)
    np.testing.assert_array_equal(price, settled)
    least = 1 - min(high, 10 - low) / 10  # the preference of the last that may not
    gap = weight * (price[0] - price[1])  # prices are per unit of load
    assert least - 1e-6 <= gap <= least + 0.1 + 1e-6
    assert abs(weight * (near[0] - near[1]) - least) < 0.2
    if low < high:  # else all prices may rise together
        assert price[0] >= 0 >= price[1]


@pytest.mark.slow
def test_find_prices_of_loose_bounds_are_nothing():
    for price in compiled(EAGER, ONE, make_bounds(0, 10), 1):
        assert price.tolist() == [0, 0]


def choose(scores, capacity):
    """Clients [E] that hold each expert where all take their best."""
    rank = np.argsort(np.argsort(-scores, axis=1), axis=1)
    return (rank < capacity[:, None]).sum(0)


@pytest.mark.slow
def test_find_prices_make_choices_nearly_fit():
    rng = np.random.default_rng(1)
    scores = (rng.random((200, 8)) + rng.random(8)).astype(np.float32)
    capacity = rng.integers(1, 5, 200).astype(np.int32)
    mean = capacity.sum() / 8
    bounds = make_bounds(0.9 * mean, 1.1 * mean, clients=200, experts=8)
    near, _, price = map(np.asarray, compiled(scores, capacity, bounds, 4))
    load = choose(scores - price, capacity)
    for chosen in (load, choose(scores - near, capacity)):
        beyond = np.maximum(chosen - bounds.high, 0) + np.maximum(
            bounds.low - chosen, 0
        )
        assert beyond.sum() < 0.01 * capacity.sum()
    # Where a price is not 0, its bound is nearly tight.
    np.testing.assert_allclose(load[price > 0], 1.1 * mean, atol=3)
    np.testing.assert_allclose(load[price < 0], 0.9 * mean, atol=3)
    assert (price > 0).any() and (price < 0).any()
