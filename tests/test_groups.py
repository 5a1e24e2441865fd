"""Classes and groups of strata, and the information of an assignment, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.groups import measure_information, mix_classes, mix_groups

MIX = jnp.array([[0.5, 0.25, 0.0, 0.0, 0.25, 0.0], [0.0, 0.0, 0.1, 0.2, 0.3, 0.4]])


def test_mixes_by_hand():
    """Two groups of three classes."""
    assert mix_classes(MIX, 1) is MIX
    classes = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
    np.testing.assert_allclose(mix_classes(MIX, 2), classes, atol=1e-7)
    np.testing.assert_allclose(
        mix_groups(MIX, 2), [[0.75, 0.25], [0.1, 0.9]], atol=1e-7
    )


APART, BOTH, NONE = [[1, 0], [0, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("held", "bits"),
    [
        ([*APART, *APART], 1.0),
        ([*BOTH, *BOTH], 0.0),
        ([*BOTH, *APART], 0.188722),  # 1 - H(1/4)
        ([*APART, *NONE], 1.0),  # who holds nothing is left out
        ([*NONE, *NONE], 0.0),
        ([[1, 0], [1, 0], [1, 0], [1, 0]], 0.0),
    ],
)
def test_measure_information_of_two_groups_and_experts(held, bits):
    """Clients 0 and 2 are of one group, 1 and 3 of the other."""
    group = jnp.array([[1.0, 0.0], [0.0, 1.0]] * 2)
    found = measure_information(jnp.array(held, bool)[:, None], group)
    np.testing.assert_allclose(found, bits, atol=1e-5)
    layers = jnp.stack([jnp.array(held, bool), jnp.ones((4, 2), bool)], axis=1)
    np.testing.assert_allclose(measure_information(layers, group), bits / 2, atol=1e-5)


def test_measure_information_sums_over_pairs():
    """Against a loop over pairs of group and expert, of clients of mixed groups."""
    held = jax.random.bernoulli(jax.random.key(0), 0.4, (9, 1, 5))
    group = jax.random.dirichlet(jax.random.key(1), jnp.full(3, 0.3), (9,))
    joint = np.zeros((3, 5))
    for mix, row in zip(np.asarray(group), np.asarray(held[:, 0]), strict=True):
        for expert in np.flatnonzero(row):
            joint[:, expert] += mix / row.sum()
    joint /= joint.sum()
    expected = sum(
        p * np.log2(p / (joint[g].sum() * joint[:, e].sum()))
        for (g, e), p in np.ndenumerate(joint)
        if p > 0
    )
    np.testing.assert_allclose(measure_information(held, group), expected, rtol=1e-4)
    assert 0 < expected < np.log2(3)
