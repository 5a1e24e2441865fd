"""Usage and the statistics of load, against hand numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.align.usage import (
    load_cv,
    load_entropy,
    normalise_usage,
    starved,
    update_usage,
)


def test_update_usage_and_normalise_usage_by_hand():
    usage = update_usage(jnp.array([10.0, 0.0]), jnp.array([1.0, 4.0]), jnp.array(0.5))
    np.testing.assert_allclose(usage, [6.0, 4.0])
    np.testing.assert_allclose(normalise_usage(usage), [1.0, 4 / 6], rtol=1e-6)
    np.testing.assert_array_equal(normalise_usage(jnp.zeros(3)), np.zeros(3))


def test_load_cv_load_entropy_and_starved_by_hand():
    load = jnp.array([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])  # mean 5, std 2
    assert load_cv(load) == pytest.approx(0.4)
    two_of_four = jnp.array([3.0, 3.0, 0.0, 0.0])
    assert load_entropy(two_of_four) == pytest.approx(0.5)  # log 2 / log 4
    assert load_cv(two_of_four) == pytest.approx(1.0)
    assert starved(two_of_four) == 2
    assert starved(jnp.array([0.9, 1.1, 28.0])) == 1  # a tenth of the mean is 1


@pytest.mark.parametrize("load", [np.zeros(4), np.full(4, 3.0), np.full(1, 3.0)])
def test_load_cv_load_entropy_and_starved_of_even_load(load):
    load = jnp.asarray(load, jnp.float32)
    assert load_cv(load) == 0 and starved(load) == 0
    assert load_entropy(load) == pytest.approx(1.0)
