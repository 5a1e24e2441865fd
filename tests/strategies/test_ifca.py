"""IFCA: the choice by hand, a round against a loop, and groups that it finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.strategies.ifca import choose_best

choose = jax.jit(choose_best, static_argnums=2)


def choose_by(seed, probe, slot=(True,) * 4):
    """The place that is chosen, the only one."""
    key = jax.random.key(seed)
    chosen = choose(jnp.float32(probe), jnp.array(slot), None, key)
    assert chosen.dtype == bool and int(chosen.sum()) == 1
    return int(chosen.argmax())


@pytest.mark.parametrize(
    ("probe", "slot", "expected"),
    [
        ([2.0, 1.0, 3.0, 1.5], [1, 1, 1, 1], 1),
        ([2.0, 1.0, 3.0, 1.5], [1, 0, 1, 1], 3),  # the best was not received
        ([2.0, np.nan, np.inf, 3.0], [1, 1, 1, 1], 0),
        ([np.nan, 1.0, 9.0, 0.0], [1, 0, 0, 0], 0),  # a dense warm-up, diverged
        ([2.0, 1.0, 1.001, 3.0], [1, 1, 1, 1], 1),  # no tie
    ],
)
def test_choose_best_by_hand(probe, slot, expected):
    for seed in range(5):
        assert choose_by(seed, probe, np.array(slot, bool)) == expected


@pytest.mark.parametrize(
    ("probe", "tied"),
    [
        ([1.0, 1.0, 1.0, 1.0], {0, 1, 2, 3}),  # copies, after a dense warm-up
        ([2.0, 1.0, 1.0 + 2e-7, 3.0], {1, 2}),  # but for rounding
        ([np.nan, np.inf, np.nan, 0.0], {0, 1, 2}),  # the last was not received
    ],
)
def test_choose_best_draws_among_equals(probe, tied):
    slot = [True, True, True, probe[3] > 0]
    places = [choose_by(seed, probe, slot) for seed in range(60)]
    assert set(places) == tied
    assert max(map(places.count, tied)) < 1.6 * 60 / len(tied)


@given(st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4), st.data())
def test_choose_best_has_no_more_loss_than_any(probe, data):
    slot = data.draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
    place = choose_by(data.draw(st.integers(0, 9)), probe, slot)
    assert slot[place]
    least = np.float32(probe)[slot].min()
    assert np.float32(probe)[place] <= least * (1 + 2e-6)
