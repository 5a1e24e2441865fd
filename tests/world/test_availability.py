"""Clients out of reach, clients that drop out, and the draw of a cohort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SIZES,
    choose,
    make_devices,
    make_federation,
    make_hyper,
    make_program,
)

from fedmoe_jax.options import UserError
from fedmoe_jax.types import make_keys
from fedmoe_jax.world.availability import (
    Reach,
    choose_cohort,
    draw_dropout,
    init_reach,
    reach_share,
    sample_cohort,
    sample_weighted,
    share_now,
)
from fedmoe_jax.world.step import observe, start_view, step_world

pytestmark = pytest.mark.slow

KEYS = make_keys(jax.random.key(2), 0)

# ---- reach


def test_reach_share_follows_the_hour_by_hand():
    phase = jnp.array([0.0, 0.25, 0.5])
    numbers = dict(share=jnp.float32(0.6), swing=jnp.float32(0.5), day=jnp.float32(4))
    at = lambda round: reach_share(jnp.int32(round), phase, **numbers)
    np.testing.assert_allclose(at(0), [0.6, 1.0, 0.6], atol=1e-6)  # 1.1 is cut to 1
    np.testing.assert_allclose(at(1), [1.0, 0.6, 0.1], atol=1e-6)
    np.testing.assert_allclose(at(5), at(1), atol=1e-6)


def test_share_now_swings_through_the_day():
    hyper = make_hyper(availability=dict(share=0.5, swing=0.3, day=4.0))
    sizes = SIZES._replace(num_clients=2000)
    at = lambda round, keys=KEYS: np.array(
        share_now(jnp.int32(round), init_reach(keys, hyper, sizes).phase, hyper)
    )
    morning, evening = at(0), at(2)
    np.testing.assert_allclose(morning + evening, np.ones(2000), atol=1e-5)
    # all places of the globe: a sine of amplitude 0.3 at uniform phases
    np.testing.assert_allclose([morning.min(), morning.max()], [0.2, 0.8], atol=1e-3)
    np.testing.assert_allclose(morning.std(), 0.3 / np.sqrt(2), atol=0.01)
    tomorrow = make_keys(jax.random.key(2), 1)
    np.testing.assert_allclose(at(4, tomorrow), morning, atol=1e-5)


def test_step_reach_reaches_clients_as_often_as_their_hour_says():
    numbers = dict(share=0.5, swing=0.5, day=4.0, persistence=0.0)
    hyper, count = make_hyper(availability=numbers), 4000
    phase = jax.random.uniform(jax.random.key(4), (count,))
    state, chain = {"reach": Reach(phase, jnp.zeros(count, bool))}, choose("reach")
    reach = step_world(state, KEYS, jnp.int32(1), hyper, chain)["reach"].now
    share = np.array(share_now(jnp.int32(1), phase, hyper))
    for low in (0.0, 0.25, 0.5, 0.75):
        these = (low <= share) & (share < low + 0.25)
        # 600 clients or more; four standard errors of at most 0.02
        np.testing.assert_allclose(reach[these].mean(), share[these].mean(), atol=0.08)


# ---- dropout


def test_draw_dropout_loses_clients_as_often_and_when_it_should():
    moment = np.array(draw_dropout(jax.random.key(2), 20_000, rate=0.2, early=0.25))
    assert abs(np.mean(moment < 1) - 0.2) < 0.01
    assert abs(np.mean(moment == 0) - 0.05) < 0.006
    during = moment[(moment > 0) & (moment < 1)]
    np.testing.assert_allclose(
        np.quantile(during, [0.25, 0.5, 0.75]), [1, 2, 3] / np.float64(4), atol=0.03
    )
    never = draw_dropout(jax.random.key(2), 100, rate=0.0, early=0.25)
    assert np.isposinf(never).all()


@pytest.mark.parametrize("early", [0.0, 1.0])
def test_step_dropout_loses_clients_when_the_numbers_say(early):
    hyper = make_hyper(availability={"dropout": 1.0, "early": early})
    state, chain = {"dropout": jnp.full(20, jnp.inf)}, choose("dropout")
    state = step_world(state, KEYS, jnp.int32(0), hyper, chain)
    federation = make_federation(devices=make_devices(20))
    events = observe(state, federation, hyper, chain).events
    during = (0 < events.dropout) & (events.dropout < 1)
    assert during.all() if early == 0 else jnp.all(events.dropout == 0)


# ---- cohorts


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


def test_sample_weighted_draws_in_proportion_to_the_weight():
    weight = jnp.array([1.0, 2.0, 5.0, 0.0])
    keys = jax.random.split(jax.random.key(1), 4000)
    one = jax.vmap(lambda key: sample_weighted(key, weight, 1))(keys)
    share = np.bincount(np.ravel(one), minlength=4) / 4000
    np.testing.assert_allclose(share, [1 / 8, 2 / 8, 5 / 8, 0], atol=0.03)
    two = np.array(jax.vmap(lambda key: sample_weighted(key, weight, 2))(keys))
    assert np.all(np.diff(two, axis=1) > 0)
    # without replacement: P(0 and 1) = 1/8 x 2/7 + 2/8 x 1/6
    both = np.mean((two == [0, 1]).all(1))
    np.testing.assert_allclose(both, 1 / 28 + 1 / 24, atol=0.02)


def test_sample_weighted_fills_up_the_cohort_where_too_few_have_weight():
    weight, rest = jnp.array([0.0, 1.0, 0.0, 0.0, 1.0]), set()
    for seed in range(20):
        cohort = sample_weighted(jax.random.key(seed), weight, 3)
        assert {1, 4} < set(cohort.tolist())
        rest.add(next(iter(set(cohort.tolist()) - {1, 4})))
    assert rest == {0, 2, 3}


def test_choose_cohort_by_sampling():
    reach = jnp.array([True, False, True, False, False])
    federation = make_federation(
        size=jnp.array([1, 1, 1, 1, 10_000_000]), devices=make_devices(5)
    )
    view = start_view(federation)
    view = view.replace(events=view.events.replace(reachable=reach))
    sizes = SIZES._replace(num_clients=5, cohort_size=2)

    def draw(sampling, seed):
        static = make_program(**{"availability.sampling": sampling}).static
        return choose_cohort(jax.random.key(seed), view, sizes, static).tolist()

    assert all(draw("reachable", seed) == [0, 2] for seed in range(10))
    assert all(4 in draw("size", seed) for seed in range(10))
    seen = {tuple(draw("uniform", seed)) for seed in range(60)}
    assert len(seen) == 10  # every pair, whichever can be reached
    everyone = sizes._replace(cohort_size=5)
    static = make_program(**{"availability.sampling": "reachable"}).static
    cohort = choose_cohort(jax.random.key(0), view, everyone, static)
    assert cohort.tolist() == [0, 1, 2, 3, 4]
