"""Assignment under load bounds against SciPy's HiGHS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, linprog, milp

from fedmoe_jax.align.bounded import bounded_top_k, violation
from fedmoe_jax.align.prices import Bounds, sum_load
from fedmoe_jax.types import Assignment

pytestmark = pytest.mark.slow

K = 4


def make_case(seed, clients=30, experts=8, whole=True, low=0.8, high=1.2):
    """Popular experts, capacities of 1 to 4; NumPy arrays."""
    rng = np.random.default_rng(seed)
    scores = rng.random((clients, experts)) + rng.random(experts)
    capacity = rng.integers(1, K + 1, clients).astype(np.int32)
    weight = np.ones(clients) if whole else rng.integers(20, 400, clients)
    mean = (weight * capacity).sum() / experts
    low, high = low * mean, high * mean
    if whole:
        low, high = np.floor(low), np.ceil(high)
    bounds = Bounds(
        weight=weight.astype(np.float32),
        low=np.full(experts, low, np.float32),
        high=np.full(experts, high, np.float32),
    )
    return scores.astype(np.float32), capacity, bounds


solve = jax.jit(bounded_top_k, static_argnames=("max_held", "whole"))


def make_rows(scores, bounds):
    """Constraint matrices over the flattened [C * E] unknowns: capacities, loads."""
    clients, experts = scores.shape
    capacities = sparse.kron(sparse.eye(clients), np.ones((1, experts))).tocsr()
    loads = sparse.kron(bounds.weight[None], sparse.eye(experts)).tocsr()
    return capacities, loads


def solve_program(scores, capacity, bounds, slack=0.0):
    """HiGHS: the largest total of the linear program; with slack, the least slack."""
    capacities, loads = make_rows(scores, bounds)
    experts = scores.shape[1]
    cost, extra = -scores.ravel(), sparse.csr_matrix((2 * experts, 0))
    if slack:
        cost = np.concatenate([slack * cost, np.ones(experts)])
        extra = -sparse.vstack([sparse.eye(experts)] * 2)
        capacities = sparse.hstack(
            [capacities, sparse.csr_matrix((len(capacity), experts))]
        )
    found = linprog(
        cost,
        A_ub=sparse.hstack([sparse.vstack([loads, -loads]), extra]),
        b_ub=np.concatenate([bounds.high, -bounds.low]),
        A_eq=capacities,
        b_eq=capacity,
        bounds=[(0, 1)] * scores.size + [(0, None)] * (experts if slack else 0),
        method="highs",
    )
    return found.status, found.x


def solve_integers(scores, capacity, bounds):
    """HiGHS: the largest total with whole numbers, to one in ten thousand."""
    capacities, loads = make_rows(scores, bounds)
    found = milp(
        -scores.ravel(),
        constraints=[
            LinearConstraint(capacities, capacity, capacity),
            LinearConstraint(loads, bounds.low, bounds.high),
        ],
        integrality=np.ones(scores.size),
        bounds=Box(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    return -found.fun


def total(scores, assignment):
    taken = np.take_along_axis(scores.astype(float), np.asarray(assignment.held), 1)
    return taken[np.asarray(assignment.slot)].sum()


def missed(assignment, bounds):
    load = sum_load(assignment, jnp.asarray(bounds.weight), len(bounds.low))
    return float(violation(load, bounds).sum())


def assert_rows(assignment, capacity):
    rows = np.asarray(assignment.held), np.asarray(assignment.slot), capacity
    for ids, slot, count in zip(*rows, strict=True):
        assert slot.sum() == count and len(set(ids[slot])) == count


@pytest.mark.parametrize("seed", range(10))
def test_bounded_top_k_of_whole_bounds_is_the_optimum(seed):
    scores, capacity, bounds = make_case(seed)
    found = solve(scores, capacity, bounds, max_held=K, whole=True)
    assert_rows(found, capacity)
    assert missed(found, bounds) == 0
    status, x = solve_program(scores, capacity, bounds)
    assert status == 0
    np.testing.assert_allclose(total(scores, found), x @ scores.ravel(), rtol=1e-5)


def test_bounded_top_k_of_a_large_case_is_optimal_too():
    scores, capacity, bounds = make_case(3, clients=300, experts=32)
    found = solve(scores, capacity, bounds, max_held=K, whole=True)
    assert missed(found, bounds) == 0
    x = solve_program(scores, capacity, bounds)[1]
    np.testing.assert_allclose(total(scores, found), x @ scores.ravel(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_bounded_top_k_of_loads_in_examples_comes_near_the_optimum(seed):
    scores, capacity, bounds = make_case(seed, whole=False)
    found = solve(scores, capacity, bounds, max_held=K, whole=False)
    assert_rows(found, capacity)
    assert missed(found, bounds) == 0
    best = solve_integers(scores, capacity, bounds)
    assert 0.98 * best <= total(scores, found) <= best * (1 + 2e-4)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (1.5, 9.0), (1.2, 0.9)])
def test_bounded_top_k_misses_by_the_least_what_cannot_hold(low, high):
    scores, capacity, bounds = make_case(1, low=min(low, high), high=max(low, high))
    if low > high:  # room in total, but two experts want more than all clients
        want = np.where(np.arange(8) < 2, len(scores) + 3, 0).astype(np.float32)
        bounds = bounds.replace(low=want, high=np.maximum(want, bounds.high))
    found = solve(scores, capacity, bounds, max_held=K, whole=True)
    assert_rows(found, capacity)
    status, _ = solve_program(scores, capacity, bounds)
    assert status == 2  # infeasible
    x = solve_program(scores, capacity, bounds, slack=1e-6)[1]
    np.testing.assert_allclose(missed(found, bounds), x[scores.size :].sum(), atol=1e-3)


def test_bounded_top_k_of_loose_bounds_is_plain_top_k():
    scores, capacity, bounds = make_case(2, low=0.0, high=100.0)
    found = solve(scores, capacity, bounds, max_held=K, whole=True)
    best = -np.sort(-scores, axis=1)
    expected = sum(row[:count].sum() for row, count in zip(best, capacity, strict=True))
    np.testing.assert_allclose(total(scores, found), expected, rtol=1e-6)


def test_bounded_top_k_of_equal_scores_and_of_one_expert():
    bounds = Bounds(weight=jnp.ones(3), low=jnp.zeros(2), high=jnp.full(2, 2.0))
    even = solve(
        jnp.zeros((3, 2)), jnp.ones(3, jnp.int32), bounds, max_held=1, whole=True
    )
    assert missed(even, bounds) == 0
    one = Bounds(weight=jnp.ones(3), low=jnp.zeros(1), high=jnp.ones(1))
    only = solve(jnp.zeros((3, 1)), jnp.ones(3, jnp.int32), one, max_held=1, whole=True)
    assert isinstance(only, Assignment) and missed(only, one) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_bounded_top_k_under_vmap_is_each_alone(whole):
    cases = [make_case(seed, clients=12, experts=4, whole=whole) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *cases)
    one = functools.partial(bounded_top_k, max_held=K, whole=whole)
    together = jax.jit(jax.vmap(one))(*stacked)
    for i, case in enumerate(cases):
        alone = solve(*case, max_held=K, whole=whole)
        jax.tree.map(
            lambda t, a, i=i: np.testing.assert_array_equal(t[i], a), together, alone
        )
