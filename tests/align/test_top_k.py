"""The decision in blocks, as large cohorts take it, against NumPy's stable sort."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from benchmarks.alignment import state_bytes
from fedmoe_jax.align import top_k as top_k_file
from fedmoe_jax.align.learn import count_load
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.cohort import Report
from fedmoe_jax.runtime.sharding import CLIENTS, build_mesh, spread
from fedmoe_jax.strategies.greedy import GREEDY
from fedmoe_jax.strategies.load_balanced import LOAD_BALANCED
from fedmoe_jax.types import Assignment, Evidence, Feedback, Hyper, Sizes
from fedmoe_jax.world.outcome import BROKEN, MERGED, Outcome

SPECIAL = np.float32([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf])
decide = jax.jit(top_k, static_argnums=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 64 clients, the least there is, so that few clients fill several."""
    monkeypatch.setattr(top_k_file, "RANK_BLOCK", 1)
    monkeypatch.setattr(top_k_file, "DECIDE_BLOCK", 1)
    jax.clear_caches()


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
    # Few values make ties; powers of two as weights leave nothing to round.
    fitness = rng.integers(0, 5, (num_clients, num_experts)).astype(np.float32) / 4
    evidence = Evidence(
        round=jnp.int32(0),
        client=jnp.asarray(rng.permutation(num_clients), jnp.int32),
        fitness=jnp.asarray(fitness),
        usage=jnp.asarray(rng.integers(0, 9, num_experts), jnp.float32),
        capacity=jnp.asarray(rng.integers(1, max_held + 1, num_clients), jnp.int32),
        load=jnp.full(num_clients, 64.0),
        held=jnp.zeros((num_clients, num_experts), bool),
    )
    sizes = Sizes(
        num_clients, num_clients, num_experts, max_held, 1, 1, 1, 1, 2, max_held
    )
    return evidence, sizes


def make_hyper(**changes):
    fields = dict.fromkeys(Hyper.__dataclass_fields__, 0.0) | changes
    numbers = {name: jnp.float32(value) for name, value in fields.items()}
    return Hyper(**numbers | {"own": {}, "world": {}})


@pytest.mark.parametrize("strategy", [LOAD_BALANCED, GREEDY])
@pytest.mark.parametrize("exploration", [0.0, 0.5])
def test_a_block_decides_as_the_whole_cohort(strategy, exploration, monkeypatch):
    evidence, sizes = make_case(333, 12, 4, seed=1)
    hyper = make_hyper(fitness_weight=0.5, usage_weight=0.5, exploration=exploration)
    run = jax.jit(strategy.assign, static_argnums=2)
    blocks = run(evidence, hyper, sizes, jax.random.key(3))
    monkeypatch.setattr(top_k_file, "DECIDE_BLOCK", 10**9)
    jax.clear_caches()
    whole = run(evidence, hyper, sizes, jax.random.key(3))
    np.testing.assert_array_equal(blocks.held, whole.held)
    np.testing.assert_array_equal(blocks.slot, whole.slot)


def test_load_balanced_is_numpys_decision():
    evidence, sizes = make_case(333, 12, 4, seed=2)
    hyper = make_hyper(fitness_weight=0.5, usage_weight=0.5)
    got = LOAD_BALANCED.assign(evidence, hyper, sizes, jax.random.key(0))
    fitness, usage = np.asarray(evidence.fitness), np.asarray(evidence.usage)
    low, high = fitness.min(1, keepdims=True), fitness.max(1, keepdims=True)
    half = np.float32(0.5)
    scores = half * (fitness - low) / (high - low) - half * usage / usage.max()
    np.testing.assert_array_equal(got.held, oracle(scores, 4))
    expected = np.arange(4) < np.asarray(evidence.capacity)[:, None]
    np.testing.assert_array_equal(got.slot, expected)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_load_is_counted_as_numpy_counts(seed):
    rng = np.random.default_rng(seed)
    ids, slot = rng.integers(0, 7, (150, 4)), rng.random((150, 4)) < 0.7
    load = rng.integers(0, 100, (150, 4)).astype(np.float32)
    finite = rng.random(150) < 0.9
    feedback = Feedback(load, load, load, jnp.asarray(load), load, None)
    outcome = Outcome(jnp.where(finite, MERGED, BROKEN), None, None)
    report = Report(feedback, None, None, outcome, None, {}, {})
    got = count_load(report, Assignment(jnp.asarray(ids), jnp.asarray(slot)), 7)
    expected = np.zeros(7, np.float32)
    counted = slot & finite[:, None]
    np.add.at(expected, ids[counted], load[counted])
    np.testing.assert_array_equal(got, expected)


# --- memory


def test_a_million_clients_need_less_than_a_gigabyte():
    """What a run starts with, as shapes only."""
    assert 4 * 64e6 < state_bytes(1_000_000, 64) < 1e9


def test_the_decision_needs_no_second_matrix(monkeypatch):
    monkeypatch.undo()  # the real blocks
    jax.clear_caches()
    clients, experts, max_held = 100_000, 64, 4
    evidence, hyper = jax.eval_shape(
        lambda: (make_case(8, experts, max_held, 0)[0], make_hyper())
    )
    grow = lambda leaf: jax.ShapeDtypeStruct(
        tuple(clients if size == 8 else size for size in leaf.shape), leaf.dtype
    )
    evidence = jax.tree.map(grow, evidence)
    sizes = Sizes(clients, clients, experts, max_held, 1, 1, 1, 1, 2, max_held)
    assign = jax.jit(LOAD_BALANCED.assign, static_argnums=2)
    key = jax.eval_shape(jax.random.key, 0)
    memory = assign.lower(evidence, hyper, sizes, key).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * clients * experts
