"""Clients that draw their examples among all: shares, sizes, no example twice."""

import numpy as np
import pytest

from fedmoe_jax.data.overlap import draw_examples, draw_mix, draw_sizes
from fedmoe_jax.data.partition import split
from fedmoe_jax.options import UserError

Y = np.repeat(np.arange(4), 50)


def divide(kind, num_clients=1000, overlap=20, **changes):
    options = dict(num_strata=4, alpha=0.3, classes_per_client=2, min_size=1, seed=0)
    options |= changes
    return split(kind, Y, num_clients=num_clients, overlap=overlap, **options)


def test_draw_examples_by_hand():
    mix = np.array([[0, 1.0], [1.0, 0]])
    rng = np.random.default_rng(0)
    owner, example = draw_examples(np.array([1, 0, 1]), np.array([50, 2]), mix, rng)
    assert owner.tolist() == [0, 0, 1] and example.tolist() == [0, 2, 1]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes", "quantity"])
def test_split_lets_many_clients_share_few_examples(kind):
    found = divide(kind)
    assert found.size.shape == (1000,) and found.size.min() >= 1
    assert 15 < found.size.mean() <= 20
    for row, size, counts in zip(*found[:3], strict=True):
        owned = row[:size]
        assert len(set(owned)) == size
        np.testing.assert_array_equal(np.bincount(Y[owned], minlength=4), counts)
    again = divide(kind)
    np.testing.assert_array_equal(found.index, again.index)
    assert (divide(kind, seed=1).size != found.size).any()


def test_split_has_the_skew_of_its_rule():
    held = lambda kind, **more: (divide(kind, **more).label_counts > 0).sum(axis=1)
    assert (held("classes") == 2).all()
    assert held("dirichlet").mean() < 3 < held("iid").mean()
    assert (held("dirichlet", alpha=1e-38) == 1).all()
    sizes = divide("quantity").size
    assert sizes.std() > 5 and divide("iid").size.std() < 2


def test_draw_mix_leaves_out_strata_without_examples():
    share, rng = np.array([0.5, 0.0, 0.5]), np.random.default_rng(0)
    for kind in ("dirichlet", "iid"):
        mix = draw_mix(kind, np.ones((9, 3), bool), share, 0.5, rng)
        np.testing.assert_allclose(mix.sum(axis=1), 1)
        assert (mix[:, 1] == 0).all()


def test_draw_sizes_have_the_mean_that_is_asked_for():
    rng = np.random.default_rng(0)
    sizes = draw_sizes("quantity", 50, 20, 0.1, rng)
    assert sizes.sum() == 1000 and sizes.min() >= 1
    assert draw_sizes("iid", 3, 20, 0.1, rng).tolist() == [20] * 3


def test_draws_beyond_the_limit_are_refused_before_they_are_made():
    with pytest.raises(UserError, match="partition.overlap=250 .* needs 12.00 GB"):
        divide("iid", num_clients=10**6, overlap=250, limit_gb=8.0)


def test_split_refuses_rules_without_an_overlap_and_clients_that_are_too_small():
    for kind in ("shards", "natural"):
        with pytest.raises(UserError, match="with partition.overlap: dirichlet, cl"):
            divide(kind)
    with pytest.raises(UserError, match="min_size=20 .* partition.overlap=20; .* 1"):
        divide("iid", min_size=20)
