"""Desirability, against hand numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import any_scores, make_hyper
from hypothesis import given, settings

from fedmoe_jax.align.desirability import desirability, normalise_fitness

FITNESS = jnp.array([[0.2, 0.6, 1.0], [0.3, 0.3, 0.3]])
USAGE = jnp.array([0.0, 5.0, 10.0])


def test_desirability_by_hand():
    hyper = make_hyper(weights={"fitness": 0.7, "usage": 0.3})
    expected = [[0.0, 0.35 - 0.15, 0.7 - 0.3], [0.0, -0.15, -0.3]]
    got = desirability(FITNESS, USAGE, hyper)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_desirability_extremes_rank_by_one_score_alone():
    weigh = lambda fitness, usage: desirability(
        FITNESS, USAGE, make_hyper(weights={"fitness": fitness, "usage": usage})
    )
    assert np.argsort(weigh(1.0, 0.0)[0]).tolist() == [0, 1, 2]
    assert np.argsort(weigh(0.0, 1.0)[0]).tolist() == [2, 1, 0]


def test_normalise_fitness_forgets_the_scale_of_a_client():
    stretched = FITNESS * jnp.array([[100.0], [1.0]]) - 7
    np.testing.assert_allclose(
        normalise_fitness(stretched), normalise_fitness(FITNESS), atol=1e-6
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(any_scores(4, 6))
def test_normalise_fitness_is_in_the_unit_interval_for_any_scores(scores):
    got = np.asarray(normalise_fitness(jnp.asarray(scores)))
    assert np.all((got >= 0) & (got <= 1))
    assert np.all(got[~np.isfinite(scores)] == 0)
