"""Randomised response on held sets: its chances, its repair, its cover traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import list_held, make_hyper

from fedmoe_jax.privacy.request import randomise, request, train_asked
from fedmoe_jax.types import Assignment

E, CLIENTS = 4, 20_000
ALL = jnp.ones(E, bool)


def ask(epsilon, held, slot, local=0, clients=CLIENTS, seed=0):
    """The same wish of many clients, as they ask for it."""
    tile = lambda row: jnp.tile(jnp.asarray(row)[None], (clients, 1))
    wish = Assignment(tile(np.array(held, np.int32)), tile(np.array(slot, bool)))
    hyper = make_hyper(privacy={"flip": epsilon})
    client, key = jnp.arange(clients, dtype=jnp.int32), jax.random.key(seed)
    sizes = {"num_experts": E, "local_experts": local}
    return request(wish, client, hyper, key, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_request_keeps_every_bit_with_its_chance(epsilon):
    """Sets of one expert or more: an empty one gets an expert by lot."""
    asked = np.array(ask(epsilon, [2, 0], [1, 1]).asked)
    keep = 1 / (1 + np.exp(-epsilon))
    empty = keep ** (E - 2) * (1 - keep) ** 2
    for expert, wanted in enumerate([True, False, True, False]):
        chance = (keep if wanted else 1 - keep) + empty / E
        error = np.sqrt(chance * (1 - chance) / CLIENTS)
        assert abs(asked[:, expert].mean() - chance) < 4.5 * error
    assert asked.any(1).all()


def test_request_bounds_the_odds_of_every_set_by_the_bits_that_differ():
    """Local differential privacy: of two wishes that differ in two bits, e^(2 eps)."""
    epsilon = 0.7
    codes = [
        np.array(ask(epsilon, *wish, seed=seed).asked) @ (2 ** np.arange(E))
        for seed, wish in enumerate((([0, 1], [1, 1]), ([0, 2], [1, 1])))
    ]
    one, other = (np.bincount(code, minlength=2**E) / CLIENTS for code in codes)
    assert one[0] == other[0] == 0 and (one[1:] > 0).all() and (other[1:] > 0).all()
    odds = one[1:] / other[1:]
    assert odds.max() < 1.15 * np.exp(2 * epsilon)
    assert odds.max() > 0.8 * np.exp(2 * epsilon)


@pytest.mark.slow
def test_request_trains_what_it_holds_and_asks_for_or_else_one_that_it_asks_for():
    found = ask(0.5, [2, 0], [1, 1], clients=500)
    for trained, asked in zip(list_held(found), np.array(found.asked), strict=True):
        own = {2, 0} & set(np.flatnonzero(asked))
        assert set(trained) == own if own else asked[trained].all()
        assert len(set(trained)) == len(trained) >= 1
    others = [held for held in list_held(found) if not {2, 0} & set(held)]
    assert len(others) > 20 and {held[0] for held in others} == {1, 3}


@pytest.mark.slow
def test_request_of_a_large_epsilon_is_the_assignment():
    found = ask(50.0, [2, 0], [1, 0], clients=50)
    assert list_held(found) == [[2]] * 50
    np.testing.assert_array_equal(
        found.asked, np.arange(E)[None] == np.full((50, 1), 2)
    )


@pytest.mark.slow
def test_request_leaves_out_what_stays_with_the_client():
    found = ask(0.5, [0, 3], [1, 1], local=1, clients=300)
    asked = np.array(found.asked)
    assert not asked[:, 3].any() and asked[:, :3].any(1).all()
    assert np.array(found.assigned).astype(int).tolist() == [[1, 0, 0, 0]] * 300
    for trained, row in zip(list_held(found), asked, strict=True):
        assert 3 in trained and (0 in trained) == row[0]


def test_randomise_has_no_expert_where_none_travels():
    drawn = jnp.full((2, E), 0.5)
    found = randomise(ALL, ~ALL, jnp.float32(1.0), drawn)
    assert not found.any()


def test_train_asked_by_hand():
    held, slot = jnp.array([2, 0, 1]), jnp.array([True, True, False])
    lots = jnp.array([0.1, 0.3, 0.2, 0.9])
    cases = {(0, 1, 1, 0): ([2], 2), (0, 1, 0, 0): ([1], 1), (0, 1, 0, 1): ([3], 3)}
    for asked, (expected, first) in cases.items():
        asked = jnp.array(asked, bool)
        found, valid = train_asked(held, slot, asked, ALL, lots)
        assert np.array(found)[np.array(valid)].tolist() == expected
        assert found[0] == first
