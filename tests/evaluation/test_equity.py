"""How evenly clients are served: by hand, and against SciPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_program
from scipy import stats

from fedmoe_jax.evaluation.equity import (
    correlate,
    measure_spread,
    measure_strength,
    measure_top,
    rank,
)
from fedmoe_jax.types import AlignState, SimState
from fedmoe_jax.world.participation import init_participation

ALL = jnp.ones(4, bool)


def test_rank_by_hand():
    values = jnp.array([3.0, 1.0, jnp.nan, 1.0, 9.0])
    counted = jnp.array([True, True, False, True, True])
    found = np.asarray(rank(values, counted))[np.asarray(counted)]
    np.testing.assert_allclose(found, [2.5 / 4, 1 / 4, 1 / 4, 3.5 / 4])


@pytest.mark.parametrize("ties", [False, True])
def test_correlate_of_ranks_is_spearmans(ties):
    rng = np.random.default_rng(2)
    left, right = rng.random((2, 30)).astype(np.float32)
    if ties:
        left = left.round(1)
    counted = rng.random(30) < 0.7
    places = [rank(jnp.array(side), jnp.array(counted)) for side in (left, right)]
    expected = stats.spearmanr(left[counted], right[counted]).statistic
    np.testing.assert_allclose(correlate(*places, counted), expected, atol=1e-5)


def test_correlate_of_what_does_not_vary_is_0():
    assert correlate(jnp.ones(4), jnp.arange(4.0), ALL) == 0


def test_measure_spread_leaves_out_clients_that_do_not_count():
    accuracy = jnp.array([0.2, 0.6, jnp.nan, 0.9])
    counted = jnp.array([True, True, False, False])
    found = measure_spread(accuracy, counted)["accuracy_spread"]
    np.testing.assert_allclose(found, 0.2, rtol=1e-6)


def test_measure_strength_by_hand():
    """The client with most memory does not count: two are left in each third."""
    memory = jnp.array([6.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0])
    accuracy = jnp.array([0.9, 0.1, 0.3, 0.5, 0.5, 0.7, jnp.nan])
    found = measure_strength(accuracy, memory, jnp.isfinite(accuracy))
    np.testing.assert_allclose(found["weakest_accuracy"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(found["capacity_gap"], 0.8 - 0.2, rtol=1e-6)
    expected = stats.spearmanr(memory[:6], accuracy[:6]).statistic
    np.testing.assert_allclose(found["capacity_correlation"], expected, rtol=1e-5)


def test_measure_strength_of_equal_devices_has_no_thirds():
    found = measure_strength(jnp.array([0.2, 0.4, 0.6, 0.8]), jnp.ones(4), ALL)
    assert jnp.isnan(found["capacity_gap"]) and found["capacity_correlation"] == 0


def make_state(program, held, fitness, rounds):
    took_part = init_participation(program.sizes).replace(rounds=jnp.array(rounds))
    align = AlignState(
        fitness=jnp.array(fitness)[:, None],
        usage=jnp.zeros((1, 4)),
        held=jnp.array(held)[:, None] > 0,
        times_held=jnp.zeros((len(held), 1, 4), jnp.int32),
    )
    fields = dict.fromkeys(SimState.__dataclass_fields__)
    return SimState(**fields | {"align": align, "participation": took_part})


def test_measure_top_by_hand():
    """Of six clients two are weak; experts 1 and 3 are the fitter half."""
    program = make_program(num_clients=6)
    held = np.zeros((6, 4))
    held[0, 3], held[1, 0], held[2:, 1] = 1, 1, 1
    fitness = np.tile([0.1, 0.5, 0.2, 0.9], (6, 1)).astype(np.float32)
    memory = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    share = lambda rounds: float(
        measure_top(make_state(program, held, fitness, rounds), memory, program)[
            "weakest_top_share"
        ]
    )
    assert share([1] * 6) == 0.5  # client 0, of 0 and 1
    assert share([0, *[1] * 5]) == 0.0  # it has never counted


@pytest.mark.parametrize("strategy", ["fedavg_active", "heterofl", "pfedmoe"])
def test_measure_top_needs_experts_to_choose_from(strategy):
    program = make_program(strategy=strategy)
    assert measure_top(None, jnp.ones(10), program) == {}
