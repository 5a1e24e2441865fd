"""Random draws: fair, each client's own, and kept where they are to be."""

import jax
import numpy as np
import pytest
from factories import SIZES, make_hyper, prepare_strategy

from fedmoe_jax.align.top_k import to_mask


@pytest.mark.slow
def test_random_holds_every_expert_equally_often():
    assign, evidence = prepare_strategy("random")
    keys = jax.random.split(jax.random.key(0), 400)
    hyper = make_hyper()
    hold = jax.vmap(lambda key: to_mask(assign(evidence, hyper, key=key), 5))
    share = jax.jit(hold)(keys).mean(axis=0)
    expected = np.broadcast_to(evidence.capacity[:, None] / 5, (6, 5))
    np.testing.assert_allclose(share, expected, atol=0.1)  # 4 standard errors


def test_random_does_not_depend_on_the_cohort():
    assign, evidence = prepare_strategy("random")
    alone = jax.tree.map(lambda leaf: leaf[2:3], evidence.replace(round=None))
    whole = assign(evidence, make_hyper(), key=jax.random.key(0))
    single = assign(alone, make_hyper(), key=jax.random.key(0))
    np.testing.assert_array_equal(whole.held[2:3], single.held)


def test_fixed_random_keeps_what_it_drew():
    assign, evidence = prepare_strategy("fixed_random")
    first = assign(evidence, make_hyper(), key=jax.random.key(0))
    mask = to_mask(first, SIZES.num_experts)
    known = evidence.replace(times_held=mask.astype(np.int32))
    again = assign(known, make_hyper(), key=jax.random.key(1))
    np.testing.assert_array_equal(to_mask(again, SIZES.num_experts), mask)
    other = assign(evidence, make_hyper(), key=jax.random.key(1))
    assert np.any(to_mask(other, SIZES.num_experts) != mask)


def test_fixed_random_keeps_its_experts_through_rounds_of_lower_capacity():
    assign, evidence = prepare_strategy("fixed_random")
    times, held = evidence.times_held, []
    for seed, capacity in enumerate((3, 1, 2, 1, 3, 3)):
        known = evidence.replace(
            capacity=np.full(6, capacity, np.int32), times_held=times
        )
        got = assign(known, make_hyper(), key=jax.random.key(seed))
        held.append(np.asarray(to_mask(got, SIZES.num_experts)))
        times = times + held[-1]
    first, one, two, again, *last = held
    assert one.sum() == again.sum() == 6 and two.sum() == 12
    assert np.all(one <= two) and np.all(two <= first)
    np.testing.assert_array_equal(again, one)
    for mask in last:
        np.testing.assert_array_equal(mask, first)
