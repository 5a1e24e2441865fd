"""The parts of a transformer, by hand; whole blocks are in `test_transformer`."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.models.transformer_parts import average_prefix, normalise, rotate


def test_normalise_has_a_mean_square_of_one():
    x = jax.random.normal(jax.random.key(0), (2, 3, 50)) * 7
    found = normalise(x, jnp.ones(50))
    np.testing.assert_allclose((found**2).mean(-1), 1, rtol=1e-4)
    np.testing.assert_allclose(normalise(x, jnp.full(50, 2.0)), 2 * found, rtol=1e-6)


def test_average_prefix_by_hand():
    x = jnp.array([[[1.0], [3.0], [8.0]]])
    assert average_prefix(x).tolist() == [[[1.0], [2.0], [4.0]]]


def test_rotate_keeps_lengths_and_depends_on_distances_alone():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 6))
    rows = rotate(jnp.broadcast_to(x, (1, 1, 9, 6)))[0, 0]
    np.testing.assert_allclose((rows**2).sum(1), (x**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(rows[0], x[0, 0, 0])
    np.testing.assert_allclose(rows[1] @ rows[4], rows[5] @ rows[8], rtol=1e-4)
