"""Cohorts."""

import jax
import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.world.availability import sample_cohort


def test_sample_cohort_of_all_is_all():
    assert sample_cohort(jax.random.key(0), 5, 5).tolist() == [0, 1, 2, 3, 4]


def test_sample_cohort_is_sorted_distinct_and_fair():
    keys = jax.random.split(jax.random.key(0), 500)
    draw = jax.jit(jax.vmap(lambda key: sample_cohort(key, 10, 4)))
    cohorts = np.asarray(draw(keys))
    assert cohorts.dtype == np.int32 and cohorts.shape == (500, 4)
    assert np.all(np.diff(cohorts, axis=1) > 0)
    share = np.bincount(cohorts.ravel(), minlength=10) / 500
    np.testing.assert_allclose(share, 0.4, atol=0.1)


@pytest.mark.parametrize("size", [0, 6])
def test_sample_cohort_refuses_impossible_sizes(size):
    with pytest.raises(UserError, match=f"cohort_size={size}.*num_clients=5"):
        sample_cohort(jax.random.key(0), 5, size)
