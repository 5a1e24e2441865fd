"""Means over positions by hand, and the weights of a routing."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.base import Routing, Scores
from fedmoe_jax.positions import average, mean_loss, weigh_routing

WEIGHTS = [(None, 16 / 3), ([1.0, 3.0, 0.0], 11 / 4), ([0.0, 0.0, 0.0], 0.0)]


@pytest.mark.parametrize(("weight", "mean"), WEIGHTS)
def test_means_by_hand(weight, mean):
    values, weight = (
        jnp.array([2.0, 3.0, 11.0]),
        None if weight is None else jnp.array(weight),
    )
    np.testing.assert_allclose(average(values, weight), mean, rtol=1e-6)
    pairs = jnp.stack([values, -values], axis=1)
    np.testing.assert_allclose(average(pairs, weight), [mean, -mean], rtol=1e-6)
    scores = Scores(
        values[:, None], values[:, None], None if weight is None else weight[:, None]
    )
    np.testing.assert_allclose(mean_loss(scores), mean, rtol=1e-6)


def test_every_layer_has_the_weights_and_tied_ones_have_them_for_each_block():
    weight, gates = jnp.array([[1.0, 0.0], [2.0, 0.5]]), jnp.ones((2, 4, 3))
    flat = [1.0, 0.0, 2.0, 0.5]
    found = weigh_routing(Routing(jnp.zeros((2, 4, 5)), gates), weight)
    np.testing.assert_array_equal(found.weight, [flat, flat])
    found = weigh_routing(Routing(jnp.zeros((1, 8, 5)), gates[:1]), weight)
    np.testing.assert_array_equal(found.weight, [flat + flat])


def test_without_weights_or_a_gate_a_routing_stays():
    routing = Routing(jnp.zeros((1, 4, 5)), jnp.ones((1, 4, 3)))
    assert weigh_routing(routing, None) is routing
    alone = Routing(None, jnp.ones((1, 4, 1)))
    assert weigh_routing(alone, jnp.ones(4)) is alone
