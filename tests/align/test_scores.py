"""Fitness, usage, desirability and the solvers, against hand numbers and NumPy."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fedmoe_jax.align.desirability import desirability, normalise_fitness
from fedmoe_jax.align.fitness import idle_rule, init_fitness, score, update_fitness
from fedmoe_jax.align.top_k import (
    expected_load,
    running_top_k,
    to_mask,
    top_k,
)
from fedmoe_jax.align.usage import (
    load_cv,
    load_entropy,
    normalise_usage,
    starved,
    update_usage,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Assignment, Feedback, Hyper

C, E, K = 4, 6, 3


def make_hyper(**changes):
    fields = dict.fromkeys(Hyper.__dataclass_fields__, 0.0) | changes
    numbers = {name: jnp.float32(value) for name, value in fields.items()}
    return Hyper(**numbers | {"own": {}, "world": {}})


# Few values make ties, the free ones find signs and magnitudes. XLA on CPU reads
# subnormal numbers as zero, so they are ties there and not in NumPy.
tied = st.sampled_from([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf])
free = st.floats(width=32, allow_subnormal=False)
any_scores = st.one_of(
    hnp.arrays(np.float32, (C, E), elements=tied),
    hnp.arrays(np.float32, (C, E), elements=free),
)
capacities = hnp.arrays(np.int32, C, elements=st.integers(-2, 9))


learn = jax.jit(update_fitness)
decide_running = jax.jit(running_top_k, static_argnames=("max_held", "num_active"))


def oracle(row, capacity):
    """Best experts of one client, by sorting with the rules written out."""
    worst_last = [-np.inf if np.isnan(value) else value for value in row]
    ranked = sorted(range(len(row)), key=lambda e: (-worst_last[e], e))
    return ranked[: min(max(capacity, 1), K)]


def rows(assignment):
    held, slot = np.asarray(assignment.held), np.asarray(assignment.slot)
    return [ids[valid].tolist() for ids, valid in zip(held, slot, strict=True)]


# --- fitness


def test_init_fitness_is_the_prior_plus_bounded_noise():
    fitness = np.asarray(init_fitness(jax.random.key(0), 50, 8, 0.5, 0.01))
    assert fitness.shape == (50, 8) and fitness.dtype == np.float32
    assert np.all(np.abs(fitness - 0.5) <= 0.01 + 1e-6)
    assert len(np.unique(fitness)) > 390 and abs(fitness.mean() - 0.5) < 0.001


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("accuracy", 0.8), ("loss", np.exp(-2 * 0.5)), ("mixed", 0.75 * 0.8 + 0.25 * 0.4)],
)
def test_score_by_hand(kind, expected):
    leaf = lambda value: jnp.full((1, 1), value)
    feedback = Feedback(leaf(0.8), leaf(0.5), leaf(0.4), leaf(7.0), leaf(0.6), None)
    got = score(kind, feedback, make_hyper(loss_scale=2.0, frequency_share=0.25))
    np.testing.assert_allclose(got, [[expected]], rtol=1e-6)


def test_unknown_feedback_is_refused():
    with pytest.raises(UserError, match="fitness.feedback='x'.*accuracy, loss, mixed"):
        score("x", None, None)


def test_unknown_idle_rule_is_refused():
    with pytest.raises(UserError, match="fitness.idle='x'.*keep, decay, prior"):
        idle_rule("x", 0.9, 0.5)


@pytest.mark.parametrize(
    ("rule", "idle_from_one"),
    [("keep", 1.0), ("decay", 0.8), ("prior", 0.8 * 1 + 0.2 * 0.5)],
)
def test_update_fitness_by_hand(rule, idle_from_one):
    keep, target = idle_rule(rule, decay=0.8, prior=0.5)
    hyper = make_hyper(fitness_rate=0.3, idle_decay=keep, idle_target=target)
    assignment = Assignment(  # client 2 holds 1 and 0, client 0 holds 2 (and not 1)
        held=jnp.array([[1, 0], [2, 1]]), slot=jnp.array([[True, True], [True, False]])
    )
    scores = jnp.array([[0.0, 0.5], [0.2, 0.9]])
    counted = jnp.array([[True, False], [True, True]])
    got = learn(jnp.ones((3, 3)), jnp.array([2, 0]), assignment, scores, counted, hyper)
    idle = idle_from_one
    expected = [
        [idle, idle, 0.7 * 1 + 0.3 * 0.2],
        [idle, idle, idle],  # outside the cohort
        [1.0, 0.7 * 1 + 0.3 * 0.0, idle],  # expert 0: held, no evidence, kept
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_keep_is_exact_and_bad_scores_never_enter():
    fitness = init_fitness(jax.random.key(1), 5, 4, 0.5, 0.3)
    keep, target = idle_rule("keep", 0.9, 0.5)
    hyper = make_hyper(fitness_rate=1.0, idle_decay=keep, idle_target=target)
    held = jnp.array([[0, 1, 2]])
    assignment = Assignment(held, jnp.ones((1, 3), bool))
    bad = jnp.array([[jnp.nan, jnp.inf, -jnp.inf]])
    everything = jnp.ones((1, 3), bool)
    got = learn(fitness, jnp.array([3]), assignment, bad, everything, hyper)
    np.testing.assert_array_equal(got, fitness)


# --- usage


def test_usage_by_hand():
    usage = update_usage(jnp.array([10.0, 0.0]), jnp.array([1.0, 4.0]), jnp.array(0.5))
    np.testing.assert_allclose(usage, [6.0, 4.0])
    np.testing.assert_allclose(normalise_usage(usage), [1.0, 4 / 6], rtol=1e-6)
    np.testing.assert_array_equal(normalise_usage(jnp.zeros(3)), np.zeros(3))


def test_load_statistics_by_hand():
    load = jnp.array([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])  # mean 5, std 2
    assert load_cv(load) == pytest.approx(0.4)
    two_of_four = jnp.array([3.0, 3.0, 0.0, 0.0])
    assert load_entropy(two_of_four) == pytest.approx(0.5)  # log 2 / log 4
    assert load_cv(two_of_four) == pytest.approx(1.0)
    assert starved(two_of_four) == 2
    assert starved(jnp.array([0.9, 1.1, 28.0])) == 1  # a tenth of the mean is 1


@pytest.mark.parametrize("load", [np.zeros(4), np.full(4, 3.0), np.full(1, 3.0)])
def test_even_load(load):
    load = jnp.asarray(load, jnp.float32)
    assert load_cv(load) == 0 and starved(load) == 0
    assert load_entropy(load) == pytest.approx(1.0)


# --- desirability

FITNESS = jnp.array([[0.2, 0.6, 1.0], [0.3, 0.3, 0.3]])
USAGE = jnp.array([0.0, 5.0, 10.0])


def test_desirability_by_hand():
    hyper = make_hyper(fitness_weight=0.7, usage_weight=0.3)
    expected = [[0.0, 0.35 - 0.15, 0.7 - 0.3], [0.0, -0.15, -0.3]]
    got = desirability(FITNESS, USAGE, hyper)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_desirability_extremes_rank_by_one_score_alone():
    by_fitness = desirability(FITNESS, USAGE, make_hyper(fitness_weight=1.0))
    by_usage = desirability(FITNESS, USAGE, make_hyper(usage_weight=1.0))
    assert np.argsort(by_fitness[0]).tolist() == [0, 1, 2]
    assert np.argsort(by_usage[0]).tolist() == [2, 1, 0]


def test_fitness_scale_of_a_client_does_not_matter():
    stretched = FITNESS * jnp.array([[100.0], [1.0]]) - 7
    np.testing.assert_allclose(
        normalise_fitness(stretched), normalise_fitness(FITNESS), atol=1e-6
    )


@settings(max_examples=60)
@given(any_scores)
def test_normalised_fitness_is_in_the_unit_interval_for_any_scores(scores):
    got = np.asarray(normalise_fitness(jnp.asarray(scores)))
    assert np.all((got >= 0) & (got <= 1))
    assert np.all(got[~np.isfinite(scores)] == 0)


# --- solve


@settings(max_examples=60)
@given(any_scores, capacities)
def test_top_k_is_the_oracle_for_any_scores(scores, capacity):
    assignment = jax.jit(top_k, static_argnums=2)(scores, capacity, K)
    expected = [oracle(row, k) for row, k in zip(scores, capacity, strict=True)]
    assert rows(assignment) == expected
    assert np.all((assignment.held >= 0) & (assignment.held < E))
    mask = np.asarray(to_mask(assignment, E))
    assert mask.sum(axis=1).tolist() == np.clip(capacity, 1, K).tolist()


def test_expected_load_by_hand():
    held = jnp.array([1, 2, 4])
    got = expected_load(jnp.full(3, 100.0), held, num_active=2)
    np.testing.assert_allclose(got, [100.0, 100.0, 50.0])


def slow_running_top_k(scores, usage, weight, load, capacity, order, num_active):
    usage, picks = usage.copy(), [None] * len(scores)
    for c in order:
        share = usage / usage.max() if usage.max() > 0 else np.zeros_like(usage)
        picks[c] = oracle(scores[c] - weight[c] * share, capacity[c])
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
    # With A = K every expected load is the whole load, so nothing is rounded.
    got = decide_running(*map(jnp.asarray, args), max_held=K, num_active=K)
    assert rows(got) == slow_running_top_k(*args, num_active=K)


@settings(max_examples=40)
@given(any_scores, capacities, hnp.arrays(np.float32, E, elements=tied))
def test_running_top_k_is_valid_for_any_scores(scores, capacity, usage):
    weight, load, order = jnp.ones(C), jnp.full(C, 10.0), jnp.arange(C)
    args = jnp.asarray(scores), jnp.asarray(usage), weight, load, capacity, order
    got = decide_running(*args, max_held=K, num_active=2)
    counts = to_mask(got, E).sum(axis=1)
    assert counts.tolist() == np.clip(capacity, 1, K).tolist()


def test_large_populations_need_no_array_larger_than_the_scores():
    clients, experts, held = 100_000, 64, 4
    scores = jax.ShapeDtypeStruct((clients, experts), jnp.float32)
    capacity = jax.ShapeDtypeStruct((clients,), jnp.int32)
    solve = lambda scores, capacity: to_mask(top_k(scores, capacity, held), experts)
    memory = jax.jit(solve).lower(scores, capacity).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (4 * clients * experts)
