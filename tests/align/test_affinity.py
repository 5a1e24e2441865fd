"""How well experts suit clients, and the bias that it makes, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_evidence, make_hyper, make_program

from fedmoe_jax.align.affinity import bias_experts, bias_slots, by_fitness
from fedmoe_jax.types import Assignment

FITNESS = [
    [0.2, 0.6, 0.4, 0.2, 0.6],
    [0.5, 0.5, 0.5, 0.5, 0.5],
    [0.1, np.nan, 0.3, np.inf, 0.2],
]
SCALED = [[0, 1, 0.5, 0, 1], [0] * 5, [0, 0, 1, 0, 0.5]]
HELD, SLOT = [[1, 2], [4, 0], [2, 4]], [[1, 1], [1, 0], [1, 1]]
EVIDENCE = make_evidence(fitness=FITNESS)


def test_by_fitness_is_scaled_and_flat_rows_are_0():
    np.testing.assert_allclose(by_fitness(EVIDENCE, None), SCALED, atol=1e-6)


def make_strategy(**changes):
    return make_program(**{"gate.bias": 3.0}).strategy._replace(**changes)


def test_bias_experts_by_hand():
    hyper = make_hyper(gate={"bias": 3.0})
    found = bias_experts(EVIDENCE, hyper, make_strategy())
    np.testing.assert_allclose(found, 3 * np.array(SCALED), rtol=1e-6)
    found = bias_experts(EVIDENCE, make_hyper(gate={"bias": 0}), make_strategy())
    assert not found.any()


def test_bias_experts_takes_the_strategys_own_affinity():
    own = lambda evidence, hyper: jnp.ones(evidence.fitness.shape, int)
    found = bias_experts(
        EVIDENCE, make_hyper(gate={"bias": 0.5}), make_strategy(affinity=own)
    )
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.full((3, 5), 0.5))
    for_all = lambda evidence, hyper: jnp.ones(5)  # without an axis C
    with pytest.raises(AssertionError):
        bias_experts(EVIDENCE, make_hyper(), make_strategy(affinity=for_all))


def test_bias_slots_takes_the_held_experts():
    assignment = Assignment(jnp.array(HELD), jnp.array(SLOT, bool))
    hyper, strategy = make_hyper(gate={"bias": 2.0}), make_strategy()
    found = bias_slots(assignment, EVIDENCE, hyper, strategy)
    np.testing.assert_allclose(found.bias, [[2, 1], [0, 0], [2, 1]], rtol=1e-6)
    assert found.replace(bias=None) == assignment
    none = strategy._replace(affinity=None)
    assert bias_slots(assignment, EVIDENCE, hyper, none) is assignment
