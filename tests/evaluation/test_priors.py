"""The clients' own label priors by hand."""

import jax.numpy as jnp
import numpy as np

from fedmoe_jax.evaluation.priors import gather_priors


def test_gather_priors_by_hand():
    """Clients 3, 0 and 1 of four, which have the models 1, 0 and 1 of two."""
    mix = jnp.array([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5], [0.0, 1.0]])
    priors = gather_priors(mix, jnp.array([0, 1, 1, 1]), jnp.array([3, 0, 1]), 2)
    assert priors.row.tolist() == [0, 3, 1] and priors.start.tolist() == [0, 1, 3]
    expected = np.log([[1.001, 0.001], [0.001, 1.001], [0.251, 0.751]])
    np.testing.assert_allclose(priors.log_share, expected, atol=1e-6)


def test_gather_priors_of_models_without_clients_are_none():
    priors = gather_priors(jnp.ones((2, 1)), jnp.array([2, 2]), jnp.arange(2), 4)
    assert priors.start.tolist() == [0, 0, 0, 2, 2]
