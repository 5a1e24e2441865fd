"""Assignment by the channel: by hand, and against assignment without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SIZES,
    compile_assign,
    list_held,
    make_config,
    make_evidence,
    make_hyper,
    make_times,
)

from fedmoe_jax.align.top_k import to_mask
from fedmoe_jax.config import validate
from fedmoe_jax.options import UserError
from fedmoe_jax.strategies.channel_aware import value_alike, value_jointly
from fedmoe_jax.types import Times

KEY = jax.random.key(4)
FOUR = SIZES._replace(cohort_size=2, num_experts=4, max_held=4)


def hold(name, evidence, sizes=SIZES, **fields):
    hyper = make_hyper(**fields)
    return compile_assign(name)(evidence, hyper, key=KEY, sizes=sizes)


def make_price(price):
    return {"channel_aware": {"price": price}}


def price_out(price, expert, room, name="channel_aware"):
    """The experts of two clients of desirabilities 1, 0.75, 0.5, 0 above the least."""
    fitness, usage = [[0.9, 0.6, 0.3, 0.3]] * 2, [0.0, 0.0, 0.0, 10.0]
    expert = jnp.asarray(expert, jnp.float32)
    times = Times(jnp.broadcast_to(expert, (2, 4)), jnp.full(2, room))
    capacity = jnp.array([4, 2])
    evidence = make_evidence(
        FOUR, fitness=fitness, usage=usage, times=times, capacity=capacity
    )
    return list_held(hold(name, evidence, FOUR, **make_price(price)))


@pytest.mark.parametrize(
    ("price", "expert", "room", "expected"),
    [
        (0.0, 0.1, 1.0, [[0, 1, 2, 3], [0, 1]]),
        (0.0, 0.3, 0.7, [[0, 1], [0, 1]]),  # two fit
        (0.0, 0.3, 0.2, [[0], [0]]),  # none does
        (2.0, 0.3, 1.0, [[0, 1], [0, 1]]),  # worth 0.6 or more: of three that fit
        (9.0, 0.3, 1.0, [[0], [0]]),
        # The best takes as long as two others that are worth more.
        (0.0, [0.8, 0.4, 0.4, 0.1], 0.8, [[1, 2], [1, 2]]),
        # A price makes a slow expert no better than a fast one.
        (2.0, [0.4, 0.0, 0.0, 0.0], 1.0, [[1, 2, 0, 3], [1, 2]]),
    ],
)
def test_assign_by_hand(price, expert, room, expected):
    assert price_out(price, expert, room) == expected


def test_value_jointly_is_never_below_zero():
    evidence = make_evidence()
    value = value_jointly(evidence, make_hyper(), KEY)
    worst = np.asarray(evidence.fitness).argmin(1), np.asarray(evidence.usage).argmax()
    assert value.min() >= 0 and value.max() <= 1 and value.shape == (6, 5)
    np.testing.assert_allclose(value[:, worst[1]].min(), 0, atol=0.5)
    assert (value_alike(evidence, make_hyper(), KEY) == 1).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exploration", [0.0, 0.5])
def test_channel_aware_is_load_balanced_where_time_is_free(seed, exploration):
    """No price, and all fits into the deadline: the experts in the same slots."""
    rng = np.random.default_rng(seed)
    scores = rng.random((6, 5)), 100 * rng.random(5)
    times = make_times(expert=rng.uniform(0, 0.3))
    evidence = make_evidence(fitness=scores[0], usage=scores[1], times=times)
    fields = make_price(0.0) | {"fitness": {"exploration": exploration}}
    found, expected = (
        hold(name, evidence, **fields) for name in ("channel_aware", "load_balanced")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_channel_only_counts_by_the_time_alone():
    expert = jnp.array([0.05, 0.2, 0.3, 0.6, 1.5, 0.1])[:, None]
    room = jnp.array([0.9, 0.9, 0.7, 0.9, 0.9, -0.2])
    times = make_times(expert=expert, room=room)
    capacity = jnp.array([3, 3, 3, 3, 3, 3])
    evidence = make_evidence(times=times, capacity=capacity)
    free = make_price(0.0)
    got = hold("channel_only", evidence, **free)
    assert got.slot.sum(1).tolist() == [3, 3, 2, 1, 1, 1]
    # Which ones is drawn, whatever fitness and usage say.
    blind = make_evidence(times=times, capacity=capacity, fitness=jnp.zeros((6, 5)))
    blind = blind.replace(usage=jnp.arange(5.0))
    jax.tree.map(
        np.testing.assert_array_equal, got, hold("channel_only", blind, **free)
    )
    assert len({tuple(row) for row in np.asarray(to_mask(got, 5))[:2]}) == 2
    # Of a deadline each is worth 1 / price: nobody has more than one beyond it.
    dear = hold("channel_only", evidence, **make_price(4.0))
    assert dear.slot.sum(1).tolist() == [3, 3, 1, 1, 1, 1]


def test_channel_only_takes_the_fastest_where_times_differ():
    found = price_out(0.0, [0.4, 0.1, 0.3, 0.2], 0.65, "channel_only")
    assert found == [[1, 2, 3], [1, 3]]


def test_a_price_below_zero_is_refused():
    config = make_config(**{"strategy": "channel_aware", "channel_aware.price": -0.5})
    with pytest.raises(UserError, match="channel_aware.price=-0.5.*allowed: >= 0"):
        validate(config)
