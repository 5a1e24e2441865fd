"""FLEX-MoE: bounds and deficits by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_evidence, make_hyper

from fedmoe_jax.strategies.flex_moe import FLEX_MOE, FLEX_MOE_EXAMPLES
from fedmoe_jax.types import Assignment

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)


def test_assign_by_hand():
    """Four clients of one slot each want expert 0; bounds let two have it."""
    sizes = SIZES._replace(cohort_size=4, num_experts=2, max_held=1)
    fitness = [[0.9, 0.1], [0.9, 0.6], [0.9, 0.5], [0.9, 0.2]]
    state = {"deficit": jnp.zeros(2), "bound_violation": jnp.zeros(())}
    one = jnp.ones(4, jnp.int32)
    evidence = make_evidence(sizes, fitness=fitness, state=state, capacity=one)
    hyper = make_hyper(flex_moe={"low": 0.9, "high": 1.0, "deficit": 0.5})
    got = FLEX_MOE.assign(evidence, hyper, sizes, KEY)
    assert got.held[:, 0].tolist() == [0, 1, 1, 0]  # 1 and 2 lose least by it
    # An expert 1 that lacked 3 slots of 2 on average is worth 0.75 more to all.
    lacking = evidence.replace(state=state | {"deficit": jnp.array([0.0, 3.0])})
    free = make_hyper(flex_moe={"low": 0.0, "high": 2.0, "deficit": 0.5})
    wanted = FLEX_MOE.assign(lacking, free, sizes, KEY)
    assert wanted.held[:, 0].tolist() == [0, 1, 1, 1]  # 0.9 against 0.85, 1.35, 1.25...


def test_update_counts_what_experts_lacked():
    sizes = SIZES._replace(cohort_size=3, num_experts=3, max_held=2)
    hyper = make_hyper()
    state = {"deficit": jnp.array([0.0, 0.5, 1.0]), "bound_violation": jnp.zeros(())}
    evidence = make_evidence(sizes, state=state)
    held = jnp.array([[0, 1], [0, 1], [0, 2]], jnp.int32)
    slot = jnp.array([[True, True], [True, False], [True, True]])
    assignment = Assignment(held, slot)
    learnt = FLEX_MOE.update(evidence, assignment, None, None, hyper)
    # Loads 3, 1, 1, mean 5/3: bounds 0.8 and 1.2 of it are 1 and 2.
    np.testing.assert_allclose(learnt["deficit"], [0, 0.5 + 2 / 3, 1 + 2 / 3])
    assert learnt["bound_violation"] == 1
    # By the examples that the holders own, 10, 20 and 192: loads 222, 10, 192.
    owned = evidence.replace(size=jnp.array([10, 20, 192]))
    learnt = FLEX_MOE_EXAMPLES.update(owned, assignment, None, None, hyper)
    mean = 424 / 3
    expected = [0, 0.5 + mean - 10, 1 + mean - 192]
    np.testing.assert_allclose(learnt["deficit"], np.maximum(expected, 0), rtol=1e-5)
    missed = 222 - 1.2 * mean + 0.8 * mean - 10 + 192 - 1.2 * mean
    np.testing.assert_allclose(learnt["bound_violation"], missed, rtol=1e-5)


def test_a_client_with_few_examples_does_not_fill_an_experts_bounds():
    """Two holders an expert, or the large client against the three small ones."""
    sizes = SIZES._replace(cohort_size=4, num_experts=2, max_held=1)
    fitness = [[0.9, 0.8], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]]
    state = {"deficit": jnp.zeros(2), "bound_violation": jnp.zeros(())}
    evidence = make_evidence(
        sizes,
        fitness=fitness,
        state=state,
        capacity=jnp.ones(4, jnp.int32),
        size=jnp.array([192, 10, 10, 10]),
    )
    hyper = make_hyper(flex_moe={"low": 1.0, "high": 1.0, "deficit": 0.0})
    slots = FLEX_MOE.assign(evidence, hyper, sizes, KEY)
    assert sorted(slots.held[:, 0].tolist()) == [0, 0, 1, 1]
    got = FLEX_MOE_EXAMPLES.assign(evidence, hyper, sizes, KEY)
    assert got.held[:, 0].tolist() == [0, 1, 1, 1]  # nearest to 111 examples each
