"""Exploration: the clients whose scores are drawn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_evidence, make_hyper

from fedmoe_jax.strategies import find_strategy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "load_balanced", "load_balanced_running"])
def test_explore_is_the_share_of_clients_that_ignore_the_scores(name):
    sizes = SIZES._replace(num_clients=900, cohort_size=900, num_experts=8)
    favourite = np.zeros((900, 8))
    favourite[:, 5] = 1.0
    one = jnp.ones(900, jnp.int32)
    evidence = make_evidence(sizes, fitness=favourite, capacity=one)
    assign = jax.jit(partial(find_strategy(name).assign, sizes=sizes))
    for exploration in (0.0, 0.4, 1.0):
        hyper = make_hyper(fitness={"exploration": exploration}, weights={"usage": 0.0})
        got = assign(evidence, hyper, key=jax.random.key(2))
        share = np.bincount(got.held[:, 0], minlength=8) / 900
        expected = np.full(8, exploration / 8)  # explorers take each alike
        expected[5] += 1 - exploration
        np.testing.assert_allclose(share, expected, atol=0.04)
