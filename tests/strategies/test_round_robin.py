"""Round robin: even loads, by hand."""

import jax.numpy as jnp
import numpy as np
from factories import list_held, prepare_strategy

from fedmoe_jax.align.top_k import to_mask


def test_round_robin_loads_are_even_in_a_round_and_over_time():
    assign, evidence = prepare_strategy("round_robin")
    total = np.zeros((6, 5), int)
    for t in range(5):
        got = assign(evidence.replace(round=jnp.int32(t)), None, key=None)
        mask = np.asarray(to_mask(got, 5))
        holders = mask.sum(axis=0)
        assert holders.max() - holders.min() <= 1
        total += mask
    np.testing.assert_array_equal(
        total, np.broadcast_to(np.asarray(evidence.capacity)[:, None], (6, 5))
    )


def test_round_robin_by_hand():
    assign, evidence = prepare_strategy("round_robin", round=jnp.int32(4))
    got = assign(evidence, None, key=None)  # capacities 1 2 3 1 2 3, five experts
    expected = [[4], [0, 1], [2, 3, 4], [0], [1, 2], [3, 4, 0]]
    assert list_held(got) == expected
