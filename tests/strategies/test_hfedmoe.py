"""HFedMoE: values and weights by hand."""

import jax.numpy as jnp
import numpy as np
from factories import make_feedback, make_hyper

from fedmoe_jax.strategies.hfedmoe import expert_value, weigh_experts, weigh_gate


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
    np.testing.assert_allclose(expert_value(gates, hyper), expected, rtol=1e-5)


def test_weigh_experts_and_weigh_gate_by_hand():
    frequency, peak = jnp.array([0.6, 0.3, 0.1]), jnp.array([1.0, 0.5, 0.25])
    feedback = make_feedback(peak, frequency=frequency)
    hyper = make_hyper(hfedmoe={"share": 0.5, "beta": 0.0, "threshold": 0.2})
    every = jnp.ones(3, bool)
    client = every, feedback, jnp.int32(40), hyper
    assert weigh_experts(*client).tolist() == [40, 40, 0]
    alpha = 0.6 * (0.6 + 1.0) / 2 + 0.3 * (0.3 + 0.5) / 2
    np.testing.assert_allclose(weigh_gate(*client), [alpha] * 3, rtol=1e-6)
