"""One suite for every strategy, and the table that names them all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SIZES,
    compile_assign,
    make_evidence,
    make_hyper,
    prepare_strategy,
    sizes_of,
    tiny_config,
)

from fedmoe_jax.align.top_k import to_mask
from fedmoe_jax.options import UserError
from fedmoe_jax.strategies import (
    STRATEGIES,
    does_probe,
    either,
    find_strategy,
    traits,
)

pytestmark = pytest.mark.slow

RESIZED = tuple(n for n in STRATEGIES if sizes_of(n) != SIZES)
HOLD_ONE = ("prototypes", "update_groups")  # while no groups are known
HOLD_ALL = ("hfedmoe", "fedmoe", "fedmoe_da", "pfedmoe", "fedmix_all")  # at first
HOLD_ALL += ("ifca",)  # of which a client then trains one
HOLD_ALL += tuple(f"{name}_shared_gate" for name in ("hfedmoe", "fedmoe", "fedmix_all"))
SHARED = tuple(  # decide differently for the same training, so they share a program
    name
    for name, strategy in STRATEGIES.items()
    if traits(strategy) == traits(STRATEGIES["random"]) and name not in RESIZED
)
HYPER = make_hyper(fitness={"exploration": 0.5})
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def assert_valid(assignment, capacity, sizes):
    """Ids in range, valid slots first, distinct experts, exactly k_c of them."""
    held, slot = np.asarray(assignment.held), np.asarray(assignment.slot)
    assert held.shape == slot.shape == (len(capacity), sizes.max_held)
    assert held.dtype == np.int32 and slot.dtype == bool
    assert np.all((held >= 0) & (held < sizes.num_experts))
    places = np.arange(sizes.max_held)[None]
    np.testing.assert_array_equal(slot, places < np.asarray(capacity)[:, None])
    for ids, valid in zip(held, slot, strict=True):
        assert len(set(ids[valid])) == valid.sum()


def slots_of(name, evidence):
    """The number of experts that every client is to hold in the first round."""
    sizes = sizes_of(name)
    if name in HOLD_ALL:
        return np.full(len(evidence.client), sizes.max_held)
    if name in HOLD_ONE:
        return np.ones(len(evidence.client), int)
    return np.minimum(evidence.capacity, sizes.max_held)


@every_strategy
def test_assign_is_valid_and_deterministic_under_jit(name):
    assign, evidence = prepare_strategy(name)
    key, hyper = jax.random.key(3), HYPER
    first = assign(evidence, hyper, key=key)
    slots, sizes = slots_of(name, evidence), sizes_of(name)
    assert_valid(first, slots, sizes)
    again = assign(evidence, hyper, key=jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@every_strategy
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_assign_is_valid_whatever_the_evidence(name, bad):
    sizes = sizes_of(name)
    fitness = np.full((sizes.cohort_size, sizes.num_experts), bad)
    usage = np.full(sizes.num_experts, bad)
    assign, evidence = prepare_strategy(name, fitness=fitness, usage=usage)
    got = assign(evidence, make_hyper(), key=jax.random.key(0))
    assert_valid(got, slots_of(name, evidence), sizes)


@every_strategy
def test_assign_in_a_scan_over_rounds_of_vmap_over_keys_is_each_alone(name):
    assign, evidence = prepare_strategy(name)
    hyper, keys = HYPER, jax.random.split(jax.random.key(5), 2)

    def one_round(carry, t):
        now = evidence.replace(round=t)
        return carry, jax.vmap(lambda key: assign(now, hyper, key=key))(keys)

    together = jax.jit(lambda: jax.lax.scan(one_round, None, jnp.arange(3))[1])()
    for t, i in np.ndindex(3, 2):
        row = jax.tree.map(lambda leaf, t=t, i=i: leaf[t, i], together)
        alone = assign(evidence.replace(round=jnp.int32(t)), hyper, key=keys[i])
        jax.tree.map(np.testing.assert_array_equal, row, alone)


@every_strategy
def test_about_is_one_sentence(name):
    about = find_strategy(name).about
    assert about.endswith(".") and about.count(". ") == 0 and len(about) > 20


def test_find_strategy_lists_the_names():
    with pytest.raises(
        UserError, match="strategy='best'.*random, fixed_random, round_robin"
    ):
        find_strategy("best")


def test_find_strategy_lists_the_likeliest_name_first():
    with pytest.raises(UserError, match="strategy='gredy' .* allowed: greedy, "):
        find_strategy("gredy")


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(RESIZED)))
def test_configure_lets_mixtures_train_the_configured_model(name):
    assert sizes_of(name) == SIZES


def test_either_decides_as_the_strategy_that_is_counted_to():
    evidence, key = make_evidence(SIZES), jax.random.key(3)
    assign = jax.jit(partial(either(SHARED), sizes=SIZES))
    found = []
    for number, name in enumerate(SHARED):
        both = make_hyper(strategy=number)
        got = assign(evidence, both, key=key)
        expected = compile_assign(name)(evidence, both, key=key)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        found.append(np.asarray(to_mask(got, SIZES.num_experts)).tobytes())
    assert len(set(found)) >= 4  # they do not all decide the same
    assert assign._cache_size() == 1


@every_strategy
def test_does_probe_to_choose_and_for_its_feedback(name):
    config = tiny_config(strategy=name)
    assert does_probe(config) == (find_strategy(name).choose is not None)
    config.fitness.feedback = "probe"
    assert does_probe(config)


def test_either_of_one_strategy_is_that_strategy():
    assert either(("greedy",)) is STRATEGIES["greedy"].assign
    assert either(("greedy", "random")) is either(("greedy", "random"))
