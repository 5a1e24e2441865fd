"""What the masks of a cohort cover."""

import itertools

import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import Units
from fedmoe_jax.pruning.coverage import (
    count_holders,
    measure_overlap,
    measure_pruning,
)

RNG = np.random.default_rng(0)


def test_count_holders_is_a_loop_over_clients():
    mask = RNG.random((5, 2, 3, 4)) < 0.5
    held = np.stack([[RNG.permutation(6)[:3] for _ in range(2)] for _ in range(5)])
    counted = RNG.random((5, 2, 3)) < 0.7
    expected = np.zeros((2, 6, 4), int)
    for c, g, k in itertools.product(range(5), range(2), range(3)):
        if counted[c, g, k]:
            expected[g, held[c, g, k]] += mask[c, g, k]
    found = count_holders(*map(jnp.asarray, (mask, held, counted)), 6)
    np.testing.assert_array_equal(found, expected)


def test_measure_overlap_is_jaccard_over_all_pairs():
    masks = RNG.random((6, 3, 5)) < 0.5  # clients, experts, units
    holds = RNG.random((6, 3)) < 0.8
    both = either = 0
    for one, other in itertools.combinations(range(6), 2):
        for e in range(3):
            if holds[one, e] and holds[other, e]:
                both += (masks[one, e] & masks[other, e]).sum()
                either += (masks[one, e] | masks[other, e]).sum()
    holders = (masks & holds[..., None]).sum(0)
    found = measure_overlap(jnp.asarray(holders), jnp.asarray(holds.sum(0)))
    np.testing.assert_allclose(found, both / either, rtol=1e-6)


def test_measure_pruning_by_hand():
    units = (Units("s", "stem", 2, ()), Units("e", "experts", 4, ()))
    masks = {
        "s": jnp.array([[1, 0], [1, 1]], bool),
        "e": jnp.array(
            [[[[1, 1, 0, 0], [0, 0, 0, 0]]], [[[1, 1, 1, 1], [1, 0, 0, 0]]]], bool
        ),
    }
    held = jnp.array([[[0, 1]], [[0, 1]]])
    slot = jnp.array([[[1, 0]], [[1, 1]]], bool)
    found = measure_pruning(
        masks, held, slot, jnp.array([0, 7]), jnp.ones(2, bool), units, 3, 2
    )
    np.testing.assert_allclose(found["kept_share"], (0.5 + 1 + 0.25) / 3)
    # Client 0 has one expert, client 1 keeps all and a quarter of two: 0.375 around.
    np.testing.assert_allclose(found["kept_spread"], (0 + 0.375) / 2)
    by_capacity = np.asarray(found["kept_by_capacity"])
    np.testing.assert_allclose(by_capacity[[0, 2]], [[0.5, 0.5], [1, 0.625]])
    assert np.isnan(by_capacity[1]).all()
    assert int(found["least_coverage"]) == 0  # of expert 1 one unit has a holder
    np.testing.assert_allclose(found["mean_coverage"], (2 + 2 + 1 + 1 + 1) / 8)
    np.testing.assert_allclose(found["mask_overlap"], 2 / 4)
