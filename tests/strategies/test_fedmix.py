"""FedMix: choices, loss and weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import list_held, make_feedback, make_hyper, prepare_strategy

from fedmoe_jax.strategies import fedmix


def test_assign_takes_what_the_gate_asks_for():
    assign, evidence = prepare_strategy("fedmix")
    mass = jnp.tile(jnp.array([[0.5, 0.02, 0.3, 0.08, 0.1]]), (10, 1)).at[4].set(0.0)
    evidence = evidence.replace(state={"mass": mass})  # clients 4 to 9
    got = assign(evidence, make_hyper(), key=jax.random.key(0))
    held = list_held(got)
    assert held[1:] == [[0, 2], [0, 2, 4], [0], [0, 2], [0, 2, 4]]
    assert len(held[0]) == 1  # client 4 has not taken part and draws
    few = evidence.replace(state={"mass": jnp.where(mass < 0.4, 0.01, mass)})
    got = assign(few, make_hyper(), key=jax.random.key(0))
    assert got.slot.sum(1)[1:].tolist() == [1, 1, 1, 1, 1]


def test_gate_loss_by_hand():
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
    hyper = make_hyper(fedmix={"sparsity": 2.0, "variety": 3.0})
    one = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    loss = fedmix.gate_loss(logits, None, None, None, hyper)
    np.testing.assert_allclose(loss, 2 * one - 3 * np.log(2), rtol=1e-5)
    loss = fedmix.gate_loss(logits, jnp.array([0.0, 1.0]), None, None, hyper)
    np.testing.assert_allclose(loss, 2 * one - 3 * one, rtol=1e-5)


@pytest.mark.parametrize(
    ("apart", "weight"),
    [(200.0, None), (1.0, [0.0, 0.0])],  # a gate of 0; positions without a weight
)
def test_gate_loss_has_a_gradient_where_gates_are_0(apart, weight):
    logits = jnp.array([[apart, 0.0], [apart, 0.0]])
    weight = None if weight is None else jnp.array(weight)
    loss = lambda logits: fedmix.gate_loss(logits, weight, None, None, make_hyper())
    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == 0 and not gradient.any()


def test_by_responsibility_by_hand():
    feedback = make_feedback(jnp.zeros(2), frequency=jnp.array([0.75, 0.25]))
    weight = fedmix.by_responsibility(jnp.ones(2, bool), feedback, jnp.int32(40), None)
    assert weight.tolist() == [30, 10]
