"""The order of the units of one layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.pruning.scores import (
    SCORES,
    Layer,
    count_before_gap,
    fill_unknown,
    lamp,
    rank,
)


def make_layer(importance, magnitude=None, lot=None, gap=3.0):
    importance = jnp.asarray(importance, jnp.float32)
    zeros = jnp.zeros_like(importance)
    magnitude = zeros if magnitude is None else jnp.asarray(magnitude, jnp.float32)
    lot = zeros if lot is None else jnp.asarray(lot, jnp.float32)
    return Layer(importance, magnitude, lot, jnp.float32(gap))


def test_lamp_by_hand():
    np.testing.assert_allclose(
        lamp(jnp.array([1.0, 3.0, 2.0])), [1 / 14, 1, 4 / 13], rtol=1e-6
    )


@pytest.mark.slow
@given(st.integers(2, 9), st.floats(1e-20, 1e20))
def test_lamp_does_not_know_the_scale_of_a_layer(count, scale):
    importance = jnp.abs(draw(count)) + 0.01
    np.testing.assert_allclose(
        lamp(importance), lamp(importance * scale), rtol=1e-4, atol=1e-6
    )
    assert float(lamp(importance).max()) == 1


def test_count_before_gap_by_hand():
    # Gaps 1, 1, 1, 6: median 1, no deviation.
    ranked = jnp.array([10.0, 9.0, 8.0, 7.0, 1.0])
    assert int(count_before_gap(ranked[::-1], jnp.float32(3.0))) == 4
    even = jnp.array([5.0, 4.0, 3.0, 2.0])
    assert int(count_before_gap(even, jnp.float32(3.0))) == 4
    # Gaps 1, 3, 2, 9: median 2.5, deviations 1.5, 0.5, 0.5, 6.5, whose median is 1.
    spread = jnp.array([20.0, 19.0, 16.0, 14.0, 5.0])
    assert int(count_before_gap(spread, jnp.float32(4.0))) == 4  # 9 > 2.5 + 5.93
    assert int(count_before_gap(spread, jnp.float32(5.0))) == 5  # 9 < 2.5 + 7.41


def test_fill_unknown_takes_the_mean_of_what_is_known():
    np.testing.assert_array_equal(fill_unknown(jnp.array([-1.0, 2.0, 4.0])), [3, 2, 4])
    for alike in (jnp.zeros(3), -jnp.ones(3)):
        np.testing.assert_array_equal(fill_unknown(alike), 1)
    dead = fill_unknown(jnp.array([0.0, 8.0, 1.0]))
    assert 0 < float(dead[0]) < 1e-4 and dead[1:].tolist() == [8, 1]


def order_of(kind, layer):
    return list(np.asarray(rank(SCORES[kind](layer))))


def test_scores_follow_what_their_kind_reads():
    layer = make_layer([1, 3, 2], magnitude=[2, 1, 3], lot=[0.9, 0.1, 0.5])
    for kind in ("lamp", "gap", "uniform"):
        assert order_of(kind, layer) == [2, 0, 1]
    assert order_of("magnitude", layer) == [1, 2, 0]
    assert order_of("random", layer) == [0, 2, 1]
    assert order_of("width", layer) == [0, 1, 2]


@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_in_the_unit_interval_and_finite(kind):
    for importance in (np.zeros(5), -np.ones(5), [0, 1e-30, 1, 1e20, -1]):
        scores = SCORES[kind](make_layer(importance, importance, np.arange(5) / 5))
        assert bool(jnp.isfinite(scores).all())
        assert float(scores.min()) >= 0 and float(scores.max()) <= 1


@pytest.mark.parametrize("kind", ["lamp", "gap", "uniform"])
def test_lots_order_units_whose_importance_is_unknown(kind):
    layer = make_layer(np.zeros(4), lot=[0.2, 0.9, 0.4, 0.6])
    assert order_of(kind, layer) == [3, 0, 2, 1]


def test_gap_puts_units_behind_the_gap_after_those_of_other_layers():
    scores = SCORES["gap"](make_layer([10, 9, 8, 7, 1]))
    assert float(scores[:4].min()) > 0.5 > float(scores[4])
