"""Load-balanced assignment, by hand and against a herd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_evidence, make_hyper

from fedmoe_jax.align.top_k import expected_load, to_mask
from fedmoe_jax.align.usage import load_cv
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.strategies.load_balanced import LOAD_BALANCED


def load_cv_of(name, evidence, sizes, hyper):
    got = STRATEGIES[name].assign(evidence, hyper, sizes, jax.random.key(1))
    share = expected_load(evidence.load, got.slot.sum(axis=1), sizes.num_active)
    mask = to_mask(got, sizes.num_experts)
    return load_cv(jnp.sum(mask * share[:, None], axis=0))


@pytest.mark.slow
def test_load_balanced_running_ends_the_herd():
    sizes = SIZES._replace(num_clients=20, cohort_size=20, num_experts=8)
    flat = np.full((20, 8), 0.5)
    evidence = make_evidence(sizes, fitness=flat, usage=np.arange(8.0))
    hyper = make_hyper()
    measure = jax.jit(load_cv_of, static_argnums=(0, 2))
    literal = measure("load_balanced", evidence, sizes, hyper)
    running = measure("load_balanced_running", evidence, sizes, hyper)
    assert literal > 1.0  # all clients read the same usage and move to experts 0 to 2
    assert running < 0.2


def test_load_balanced_by_hand():
    sizes = SIZES._replace(num_clients=2, cohort_size=2, num_experts=3, max_held=2)
    evidence = make_evidence(
        sizes, fitness=[[0.1, 0.5, 0.9], [0.9, 0.1, 0.1]], usage=[0.0, 50.0, 100.0]
    )  # capacities 1 and 2
    hyper = make_hyper(weights={"fitness": 0.6, "usage": 0.4})
    got = LOAD_BALANCED.assign(evidence, hyper, sizes, jax.random.key(0))
    assert got.held[0, 0] == 2  # 0.6 - 0.4 beats 0.3 - 0.2 and 0
    assert got.held[1].tolist() == [0, 1]  # 0.6, -0.2, -0.4
