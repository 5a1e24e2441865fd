"""Ties: lots decide between equal scores, and touch nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import list_held, make_evidence, make_hyper, make_times, sizes_of

from fedmoe_jax.align import ties
from fedmoe_jax.align.top_k import to_mask, top_k
from fedmoe_jax.strategies import STRATEGIES, find_strategy

KEY, CLIENTS = jax.random.key(7), 900
RANKING = ("greedy", "load_balanced", "load_balanced_running", "fedmix", "fedjets")
top_k_by_lot = jax.jit(ties.top_k_by_lot, static_argnums=2)


def decide(scores, capacity, max_held, client=None, key=KEY):
    scores, capacity = jnp.asarray(scores, jnp.float32), jnp.asarray(capacity)
    client = jnp.arange(len(scores)) if client is None else jnp.asarray(client)
    return top_k_by_lot(scores, capacity, max_held, client, key)


def test_a_tie_for_the_last_slots_is_uniform_and_the_rest_stays():
    """Expert 3 is best; three of the equal 0, 1, 2, 4 share what is left."""
    scores = np.tile([0.5, 0.5, 0.5, 0.9, 0.5, 0.1], (CLIENTS, 1))
    got = decide(scores, np.full(CLIENTS, 3), 4)
    mask = np.asarray(to_mask(got, 6))
    assert mask[:, 3].all() and not mask[:, 5].any()
    share = mask[:, [0, 1, 2, 4]].mean(axis=0)
    np.testing.assert_allclose(share, np.full(4, 2 / 4), atol=0.06)
    pairs = {tuple(np.flatnonzero(row)) for row in mask}
    assert len(pairs) == len(list(itertools.combinations(range(4), 2)))


def test_rows_without_a_tie_are_top_ks_bit_by_bit():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(8.0), (50, 1)), axis=1)
    scores[::2, :] = 0.0  # every other row is tied
    scores[1] = [9, 9, 1, 2, 3, 4, 5, 6]  # equal, and both held
    scores[3] = [np.nan, -np.inf, 1, 2, 3, 4, 5, 6]  # equal, and neither held
    capacity = np.full(50, 3)
    got = decide(scores, capacity, 4)
    plain = top_k(jnp.asarray(scores, jnp.float32), jnp.asarray(capacity), 4)
    np.testing.assert_array_equal(got.held[1::2], plain.held[1::2])
    assert (got.held[::2] != plain.held[::2]).any(axis=1).mean() > 0.8


def test_lots_are_of_the_client_and_of_the_round():
    flat = np.zeros((6, 8))
    whole = decide(flat, np.full(6, 2), 2)
    part = decide(flat[:3], np.full(3, 2), 2, client=[5, 0, 2])
    np.testing.assert_array_equal(part.held, whole.held[jnp.array([5, 0, 2])])
    other = decide(flat, np.full(6, 2), 2, key=jax.random.key(8))
    assert (other.held != whole.held).any()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.0])
def test_any_equal_scores_tie(value):
    mask = to_mask(decide(np.full((CLIENTS, 4), value), np.ones(CLIENTS, int), 2), 4)
    np.testing.assert_allclose(np.mean(mask, axis=0), np.full(4, 0.25), atol=0.05)


def test_first_by_lot_is_argmax_and_draws_between_equal_ones():
    scores = jnp.array([[1.0, 3.0, 2.0], [2.0, 0.0, 2.0], [-jnp.inf] * 3])
    lots = jnp.array([[0.1, 0.9, 0.2], [0.8, 0.1, 0.3], [0.5, 0.2, 0.7]])
    assert ties.first_by_lot(scores, lots).tolist() == [1, 2, 1]
    assert ties.first_by_lot(scores[0], lots[0]) == 1


def test_raise_tied_raises_what_is_there_twice_alone():
    scores = jnp.array([[0.5, 0.25, 0.5, 0.75], [1.0, 0.0, 0.5, 0.25]])
    lots = jnp.array([[0.5, 0.5, 0.25, 0.5]] * 2)
    got = ties.raise_tied(scores, lots, 0.125)
    assert got.tolist() == [[0.5625, 0.25, 0.53125, 0.75], scores[1].tolist()]


def prepare(name, capacity, **changes):
    """A strategy's decision for CLIENTS that have learnt nothing yet."""
    sizes = sizes_of(name)._replace(num_clients=CLIENTS, cohort_size=CLIENTS)
    evidence = make_evidence(
        sizes,
        fitness=np.full((CLIENTS, sizes.num_experts), 0.5),
        usage=np.zeros(sizes.num_experts),
        capacity=jnp.full(CLIENTS, capacity, jnp.int32),
        state=find_strategy(name).init(sizes),
    )
    assign = jax.jit(find_strategy(name).assign, static_argnums=2)
    return assign, evidence.replace(**changes), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKING)
def test_without_any_knowledge_experts_are_held_alike(name):
    assign, evidence, sizes = prepare(name, 2)
    got = assign(evidence, make_hyper(), sizes, KEY)
    share = np.mean(to_mask(got, sizes.num_experts), axis=0)
    expected = np.full(sizes.num_experts, 2 / sizes.num_experts)
    np.testing.assert_allclose(share, expected, atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedmix", "fedjets"])
def test_equal_gates_are_drawn(name):
    assign, evidence, sizes = prepare(name, 2)
    mass = jnp.full((CLIENTS, sizes.num_experts), 1 / sizes.num_experts)
    evidence = evidence.replace(state=evidence.state | {"mass": mass})
    got = assign(evidence, make_hyper(), sizes, KEY)
    share = np.mean(to_mask(got, sizes.num_experts), axis=0)
    expected = np.full(sizes.num_experts, 2 / sizes.num_experts)
    np.testing.assert_allclose(share, expected, atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flex_moe", "flex_moe_examples"])
def test_the_bounded_decision_gives_no_client_the_lowest_ids(name):
    sizes = sizes_of(name)._replace(num_clients=60, cohort_size=60)
    strategy = find_strategy(name)
    evidence = make_evidence(
        sizes,
        fitness=np.full((60, sizes.num_experts), 0.5),
        usage=np.zeros(sizes.num_experts),
        capacity=jnp.ones(60, jnp.int32),
        state=strategy.init(sizes),
    )
    assign = jax.jit(strategy.assign, static_argnums=2)
    total = np.zeros((60, sizes.num_experts))
    for seed in range(40):
        got = assign(evidence, make_hyper(), sizes, jax.random.key(seed))
        total += np.asarray(to_mask(got, sizes.num_experts))
    # Every client holds every expert in its share of the rounds.
    expected = np.full(sizes.num_experts, 1 / sizes.num_experts)
    np.testing.assert_allclose(total.mean(axis=0) / 40, expected, atol=0.03)
    assert (total > 0).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_distinct_scores_leave_nothing_to_lots(name):
    """Evidence without ties, the same decision for two purposes of the lots."""
    strategy, sizes = find_strategy(name), sizes_of(name)
    shape = sizes.cohort_size, sizes.num_experts
    times = make_times(sizes, np.random.default_rng(1).uniform(0, 0.1, shape))
    evidence = make_evidence(sizes, state=strategy.init(sizes), times=times)

    @jax.jit
    def decide(purpose):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ties, "LOTS", purpose)
            return strategy.assign(evidence, make_hyper(), sizes, KEY)

    first, again = decide(ties.LOTS), decide(ties.LOTS + 1)
    assert list_held(first) == list_held(again)
