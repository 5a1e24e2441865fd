"""The decision, client by client and in blocks, against sorting with written rules."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, TIED, any_scores, make_evidence, make_hyper
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from fedmoe_jax.align import top_k as top_k_file
from fedmoe_jax.align.top_k import (
    _pick_by_rounds,
    _pick_by_sort,
    expected_load,
    running_top_k,
    to_mask,
    top_k,
)
from fedmoe_jax.runtime.sharding import CLIENTS, build_mesh, spread
from fedmoe_jax.strategies.greedy import GREEDY
from fedmoe_jax.strategies.load_balanced import LOAD_BALANCED

pytestmark = pytest.mark.slow

C, E, K = 4, 6, 3
SPECIAL = np.float32([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf])


def trace_anew(function):
    """The same function, of which no trace with other blocks is known."""
    return lambda *args: function(*args)


decide = jax.jit(trace_anew(top_k), static_argnums=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 64 clients, the least there is, so that few clients fill several."""
    monkeypatch.setattr(top_k_file, "RANK_BLOCK", 1)
    monkeypatch.setattr(top_k_file, "DECIDE_BLOCK", 1)


# --- client by client

capacities = hnp.arrays(np.int32, C, elements=st.integers(-2, 9))
decide_running = jax.jit(running_top_k, static_argnames=("max_held", "num_active"))


def sort_row(row, capacity, lots=None):
    """Best experts of one client, by sorting with the rules written out."""
    worst_last = [-np.inf if np.isnan(value) else value for value in row]
    lots = range(len(row)) if lots is None else lots
    ranked = sorted(range(len(row)), key=lambda e: (-worst_last[e], lots[e]))
    return ranked[: min(max(capacity, 1), K)]


def rows(assignment):
    held, slot = np.asarray(assignment.held), np.asarray(assignment.slot)
    return [ids[valid].tolist() for ids, valid in zip(held, slot, strict=True)]


@settings(max_examples=60)
@given(any_scores(C, E), capacities)
def test_top_k_is_the_sorted_row_for_any_scores(scores, capacity):
    assignment = decide(scores, capacity, K)
    expected = [sort_row(row, k) for row, k in zip(scores, capacity, strict=True)]
    assert rows(assignment) == expected
    assert np.all((assignment.held >= 0) & (assignment.held < E))
    mask = np.asarray(to_mask(assignment, E))
    assert mask.sum(axis=1).tolist() == np.clip(capacity, 1, K).tolist()


def test_expected_load_by_hand():
    held = jnp.array([1, 2, 4])
    got = expected_load(jnp.full(3, 100.0), held, num_active=2)
    np.testing.assert_allclose(got, [100.0, 100.0, 50.0])


def slow_running_top_k(scores, usage, weight, load, capacity, order, lots, num_active):
    usage, picks = usage.copy(), [None] * len(scores)
    for c in order:
        share = usage / usage.max() if usage.max() > 0 else np.zeros_like(usage)
        picks[c] = sort_row(scores[c] - weight[c] * share, capacity[c], lots[c])
        held = len(picks[c])
        usage[picks[c]] += load[c] * min(num_active, held) / held
    return picks


@settings(max_examples=40)
@given(st.integers(0, 10**6), capacities)
def test_running_top_k_is_its_slow_twin(seed, capacity):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (C, E)).astype(np.float32)  # with ties
    usage = rng.integers(0, 2, E).astype(np.float32) * 64
    weight = rng.choice([0.0, 2.0], C).astype(np.float32)
    load = rng.choice([64.0, 128.0], C).astype(np.float32)
    args = scores, usage, weight, load, capacity, rng.permutation(C)
    args = *args, rng.random((C, E), np.float32)
    # With A = K every expected load is the whole load, so nothing is rounded.
    got = decide_running(*map(jnp.asarray, args), max_held=K, num_active=K)
    assert rows(got) == slow_running_top_k(*args, num_active=K)


def test_picks_by_rounds_are_those_by_sort():
    rng = np.random.default_rng(0)
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan], np.float32)
    scores = jnp.asarray(rng.choice(values, (500, 9)))
    lots = jnp.asarray(rng.random((500, 9), np.float32))
    for max_held in (1, 4, 9):
        pick = lambda rule, k=max_held: jax.vmap(lambda s, a: rule(s, a, k))
        held = [pick(rule)(scores, lots) for rule in (_pick_by_rounds, _pick_by_sort)]
        np.testing.assert_array_equal(*held)
        assert (np.diff(np.sort(held[0], axis=1), axis=1) > 0).all()


@settings(max_examples=40)
@given(any_scores(C, E), capacities, hnp.arrays(np.float32, E, elements=TIED))
def test_running_top_k_is_valid_for_any_scores(scores, capacity, usage):
    weight, load, order = jnp.ones(C), jnp.full(C, 10.0), jnp.arange(C)
    args = jnp.asarray(scores), jnp.asarray(usage), weight, load, capacity, order
    args = *args, jnp.zeros((C, E))
    got = decide_running(*args, max_held=K, num_active=2)
    counts = to_mask(got, E).sum(axis=1)
    assert counts.tolist() == np.clip(capacity, 1, K).tolist()


# --- in blocks


def draw_scores(seed, num_clients, num_experts):
    """A mixture per client: all special, all distinct, or special among few values."""
    rng = np.random.default_rng(seed)
    shape = num_clients, num_experts
    special = rng.choice(SPECIAL, shape)
    free = rng.standard_normal(shape, np.float32)
    tied = np.where(rng.random(shape) < 0.3, special, rng.integers(-2, 3, shape))
    kind = rng.integers(0, 3, num_clients)[:, None]
    return np.choose(kind, [special, free, tied]).astype(np.float32)


def oracle(scores, max_held):
    worst_last = np.where(np.isnan(scores), -np.inf, scores)
    return np.argsort(-worst_last, axis=1, kind="stable")[:, :max_held]


def held(scores, max_held):
    capacity = np.full(len(scores), max_held, np.int32)
    return np.asarray(decide(scores, capacity, max_held).held)


# --- ranking


SHAPES = [  # (C, E, K): below one block, one, not a multiple, E = K, beyond the rounds
    (1, 8, 2),
    (63, 64, 4),
    (64, 64, 4),
    (65, 64, 8),
    (200, 5, 5),
    (130, 256, 16),
    (130, 40, 17),
    (100, 1, 1),
]


@pytest.mark.parametrize(("clients", "experts", "max_held"), SHAPES)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_top_k_is_the_stable_sort(clients, experts, max_held, seed):
    scores = draw_scores(seed, clients, experts)
    np.testing.assert_array_equal(held(scores, max_held), oracle(scores, max_held))


def test_blocks_hold_under_vmap_and_scan():
    scores = np.stack([draw_scores(seed, 150, 16) for seed in range(3)])
    capacity = np.full((3, 150), 4, np.int32)
    expected = [oracle(one, 4) for one in scores]
    one = functools.partial(top_k, max_held=4)
    mapped = jax.jit(jax.vmap(one))(scores, capacity)
    np.testing.assert_array_equal(mapped.held, expected)
    scanned = jax.lax.scan(
        lambda carry, row: (carry, one(*row)), None, (scores, capacity)
    )[1]
    np.testing.assert_array_equal(scanned.held, expected)
    np.testing.assert_array_equal(
        jax.lax.map(lambda row: one(*row).held, (scores, capacity)), expected
    )


def test_blocks_hold_inside_shard_map():
    scores, capacity = draw_scores(7, 2 * 150, 16), np.full(300, 4, np.int32)
    rows = P(CLIENTS)
    share = spread(
        functools.partial(top_k, max_held=4), build_mesh(2), (rows, rows), rows
    )
    got = jax.jit(share)(scores, capacity)
    np.testing.assert_array_equal(got.held, oracle(scores, 4))


# --- the whole decision


def make_case(num_clients, num_experts, max_held, seed):
    rng = np.random.default_rng(seed)
    sizes = SIZES._replace(
        num_clients=num_clients,
        cohort_size=num_clients,
        num_experts=num_experts,
        max_held=max_held,
    )
    # Few values make ties; powers of two as weights leave nothing to round.
    evidence = make_evidence(
        sizes,
        client=jnp.asarray(rng.permutation(num_clients), jnp.int32),
        fitness=rng.integers(0, 5, (num_clients, num_experts)) / 4,
        usage=rng.integers(0, 9, num_experts),
        capacity=jnp.asarray(rng.integers(1, max_held + 1, num_clients), jnp.int32),
    )
    return evidence, sizes


HALVES = {"fitness": 0.5, "usage": 0.5}


@pytest.mark.parametrize("strategy", [LOAD_BALANCED, GREEDY])
@pytest.mark.parametrize("exploration", [0.0, 0.5])
def test_a_block_decides_as_the_whole_cohort(strategy, exploration, monkeypatch):
    evidence, sizes = make_case(333, 12, 4, seed=1)
    hyper = make_hyper(weights=HALVES, fitness={"exploration": exploration})

    def run():
        assign = jax.jit(trace_anew(strategy.assign), static_argnums=2)
        return assign(evidence, hyper, sizes, jax.random.key(3))

    blocks = run()
    monkeypatch.setattr(top_k_file, "DECIDE_BLOCK", 10**9)
    whole = run()
    np.testing.assert_array_equal(blocks.held, whole.held)
    np.testing.assert_array_equal(blocks.slot, whole.slot)


def test_load_balanced_is_numpys_decision():
    evidence, sizes = make_case(333, 12, 4, seed=2)
    apart = np.random.default_rng(2).permuted(np.tile(np.arange(12), (333, 1)), axis=1)
    evidence = evidence.replace(fitness=jnp.asarray(apart * 16.0, jnp.float32))
    hyper = make_hyper(weights=HALVES)
    got = LOAD_BALANCED.assign(evidence, hyper, sizes, jax.random.key(0))
    fitness, usage = np.asarray(evidence.fitness), np.asarray(evidence.usage)
    low, high = fitness.min(1, keepdims=True), fitness.max(1, keepdims=True)
    half = np.float32(0.5)
    scores = half * (fitness - low) / (high - low) - half * usage / usage.max()
    np.testing.assert_array_equal(got.held, oracle(scores, 4))
    expected = np.arange(4) < np.asarray(evidence.capacity)[:, None]
    np.testing.assert_array_equal(got.slot, expected)


# --- memory


def test_top_k_needs_no_array_larger_than_the_scores(monkeypatch):
    monkeypatch.undo()  # the real blocks
    clients, experts, held = 100_000, 64, 4
    scores = jax.ShapeDtypeStruct((clients, experts), jnp.float32)
    capacity = jax.ShapeDtypeStruct((clients,), jnp.int32)
    decide = lambda scores, capacity: to_mask(top_k(scores, capacity, held), experts)
    memory = jax.jit(decide).lower(scores, capacity).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (4 * clients * experts)


def test_the_decision_needs_no_second_matrix(monkeypatch):
    monkeypatch.undo()  # the real blocks
    clients, experts, max_held = 100_000, 64, 4
    evidence, sizes = make_case(8, experts, max_held, 0)
    grow = lambda leaf: jax.ShapeDtypeStruct(
        tuple(clients if size == 8 else size for size in leaf.shape), leaf.dtype
    )
    evidence = jax.tree.map(grow, evidence)
    assign = jax.jit(trace_anew(LOAD_BALANCED.assign), static_argnums=2)
    key = jax.eval_shape(jax.random.key, 0)
    memory = (
        assign.lower(evidence, make_hyper(), sizes, key).compile().memory_analysis()
    )
    assert memory.temp_size_in_bytes < 4 * clients * experts
