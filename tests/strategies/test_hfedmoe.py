"""HFedMoE: values and weights by hand."""

import jax.numpy as jnp
import numpy as np
from factories import make_feedback, make_hyper

from fedmoe_jax.base import Route
from fedmoe_jax.models.routing import make_gates
from fedmoe_jax.strategies.hfedmoe import (
    HFEDMOE,
    HFEDMOE_SHARED_GATE,
    expert_value,
    weigh_experts,
    weigh_gate,
)


def test_gates_and_values_of_two_examples_by_hand():
    """A softmax over all four experts, of which the two largest are not renormalised.

    Renormalised as in other systems, values would be 0.394 and 0.829.
    """
    logits = jnp.array([[2.0, 1.9, 1.8, 1.7], [0.0, 3.0, -3.0, -3.0]])
    hyper = make_hyper(hfedmoe={"share": 0.5, "beta": 0.1})
    gates = make_gates(logits, jnp.ones(4, bool), Route(2, gating=HFEDMOE.gating))
    expected = [[0.2887, 0.2612, 0, 0], [0.0472, 0.9481, 0, 0]]
    np.testing.assert_allclose(gates, expected, atol=1e-4)
    value = expert_value(gates, None, hyper)
    np.testing.assert_allclose(value[:2], [0.223, 0.766], atol=1e-3)
    assert np.all(np.isneginf(value[2:]))
    shared = Route(2, gating=HFEDMOE_SHARED_GATE.gating)
    gates = make_gates(logits, jnp.ones(4, bool), shared)
    value = expert_value(gates, None, hyper)
    np.testing.assert_allclose(value[:2], [0.394, 0.829], atol=1e-3)


def test_expert_value_by_hand():
    gates = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    hyper = make_hyper(hfedmoe={"share": 0.25, "beta": 2.0, "threshold": 0.3})
    # means 3/4, 1/4, 0; largest 1, 1/2, 0
    information = [
        (0.5 * np.log(0.5 / 0.75) + np.log(1 / 0.75)) / 2,
        0.5 * np.log(0.5 / 0.25) / 2,
        0.0,
    ]
    weight = 0.25 * np.array([0.75, 0.25, 0.0]) + 0.75 * np.array([1.0, 0.5, 0.0])
    expected = weight - 2.0 * np.array(information)
    expected[2] = -np.inf  # no example is routed to it
    np.testing.assert_allclose(expert_value(gates, None, hyper), expected, rtol=1e-5)
    padded = jnp.concatenate([gates, jnp.array([[0.0, 0.0, 1.0]])])
    found = expert_value(padded, jnp.array([1.0, 1.0, 0.0]), hyper)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_weigh_experts_and_weigh_gate_by_hand():
    frequency, peak = jnp.array([0.6, 0.3, 0.1]), jnp.array([1.0, 0.5, 0.25])
    feedback = make_feedback(peak, frequency=frequency)
    hyper = make_hyper(hfedmoe={"share": 0.5, "beta": 0.0, "threshold": 0.2})
    every = jnp.ones(3, bool)
    client = every, feedback, jnp.int32(40), hyper
    assert weigh_experts(*client).tolist() == [40, 40, 0]
    alpha = 0.6 * (0.6 + 1.0) / 2 + 0.3 * (0.3 + 0.5) / 2
    np.testing.assert_allclose(weigh_gate(*client), [alpha] * 3, rtol=1e-6)
