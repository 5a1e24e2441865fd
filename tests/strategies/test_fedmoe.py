"""FedMoE: warm-up, sub-models and recommendations by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SIZES,
    list_held,
    make_evidence,
    make_feedback,
    make_hyper,
    prepare_strategy,
)

from fedmoe_jax.align.top_k import to_mask
from fedmoe_jax.strategies import fedmoe
from fedmoe_jax.types import Assignment

pytestmark = pytest.mark.slow


def test_assign_covers_the_routing_with_sub_models():
    assign, evidence = prepare_strategy("fedmoe")
    shares = jnp.tile(jnp.array([[0.05, 0.5, 0.1, 0.3, 0.05]]), (10, 1))
    capacity = jnp.array([1, 2, 3, 1, 2, 3])
    state = {"frequency": shares, "rounds": jnp.full(10, 2)}  # a warm-up of 2
    evidence = evidence.replace(state=state, capacity=capacity)
    hyper = make_hyper()  # coverage 0.8: experts 1 and 3; capacities 1 2 3 1 2 3
    got = assign(evidence, hyper, key=jax.random.key(0))
    assert list_held(got) == [[1], [1, 3], [1, 3], [1], [1, 3], [1, 3]]
    greedy = make_hyper(fedmoe={"coverage": 0.85})
    got = assign(evidence, greedy, key=jax.random.key(0))
    assert got.slot.sum(1).tolist() == [1, 2, 3, 1, 2, 3]
    assert sorted(got.held[2, :3].tolist()) == [1, 2, 3]
    roomy = evidence.replace(capacity=jnp.full(6, 5))  # for all experts
    assert assign(roomy, hyper, key=jax.random.key(0)).slot.sum(1).tolist() == [2] * 6


def test_assign_warms_up_keeps_and_swaps_by_the_clients_own_rounds():
    assign, evidence = prepare_strategy("fedmoe")
    shares = jnp.tile(jnp.array([[0.05, 0.5, 0.1, 0.3, 0.05]]), (10, 1))
    rounds = jnp.zeros(10, jnp.int32).at[4:].set(jnp.array([0, 1, 2, 3, 6, 7]))
    held = jnp.zeros((6, 5), bool).at[:, jnp.array([0, 4])].set(True).at[0, 1].set(True)
    evidence = evidence.replace(
        state={"frequency": shares, "rounds": rounds},
        capacity=jnp.full(6, 3),
        held=held,
    )
    got = assign(evidence, make_hyper(), key=jax.random.key(0))  # warm-up 2, period 5
    mask = to_mask(got, 5)
    assert mask[:2].all()  # two still warm up
    assert np.flatnonzero(mask[2]).tolist() == [1, 3]  # searched
    np.testing.assert_array_equal(mask[3:5], held[3:5])  # kept
    assert np.flatnonzero(mask[5]).tolist() == [1, 4]  # 0 swapped for the first's 1


def test_assign_cuts_to_the_most_used_where_the_room_shrinks():
    assign, evidence = prepare_strategy("fedmoe")
    shares = jnp.tile(jnp.array([[0.05, 0.5, 0.1, 0.3, 0.05]]), (10, 1))
    held = jnp.zeros((6, 5), bool).at[:, jnp.array([0, 1, 2])].set(True)
    state = {"frequency": shares, "rounds": jnp.full(10, 4)}  # warm-up 2, period 5
    capacity = jnp.array([1, 2, 3, 4, 5, 1])
    evidence = evidence.replace(state=state, capacity=capacity, held=held)
    got = assign(evidence, make_hyper(), key=jax.random.key(0))
    kept = [[1], [1, 2], [1, 2, 0], [1, 2, 0], [1, 2, 0], [1]]
    assert list_held(got) == kept


def test_vote_and_recommend_follow_similar_clients():
    frequency = jnp.array([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4], [0.0, 0.1, 0.9]])
    held = jnp.array([[1, 1, 0], [1, 0, 1], [0, 0, 1]], bool)
    cos = 0.36 / (0.36 + 0.16)
    votes = fedmoe.vote(frequency, held)
    unit = frequency / np.linalg.norm(frequency, axis=1, keepdims=True)
    np.testing.assert_allclose(votes[0, 0], cos, rtol=1e-5)
    np.testing.assert_allclose(votes[0, 2], cos + unit[0] @ unit[2], rtol=1e-5)
    lots = jnp.zeros((3, 3))
    swapped = fedmoe.recommend(frequency, held, lots)
    # 0 swaps expert 1 for 2, 1 swaps 2 for 1, 2 keeps its only one
    assert swapped.astype(int).tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    alone = fedmoe.recommend(frequency[:1], held[:1], lots[:1])
    assert alone.tolist() == held[:1].tolist()


def test_update_learns_the_routing_of_held_experts():
    sizes = SIZES._replace(num_clients=3, cohort_size=2, num_experts=3, max_held=3)
    known = {
        "frequency": jnp.array([[9.0] * 3, [0.0] * 3, [0.2, 0.3, 0.5]]),
        "rounds": jnp.array([4, 0, 2]),
    }
    evidence = make_evidence(sizes, state=known)  # clients 1 and 2
    held = jnp.array([[0, 1, 2], [2, 0, 1]], jnp.int32)
    slot = jnp.array([[True, True, True], [True, True, False]])
    assignment = Assignment(held, slot)
    shares = jnp.array([[0.7, 0.2, 0.1], [0.9, 0.1, 0.0]])
    feedback = make_feedback(shares)
    hyper = make_hyper(fitness={"rate": 0.25})
    learnt = fedmoe.update(evidence, assignment, feedback, None, hyper)
    # Client 2 holds experts that had 0.7 of its routing: they share that out.
    moved = [0.2 + 0.25 * (0.7 * 0.1 - 0.2), 0.3, 0.5 + 0.25 * (0.7 * 0.9 - 0.5)]
    expected = [[9, 9, 9], [0.7, 0.2, 0.1], moved]
    np.testing.assert_allclose(learnt["frequency"], expected, rtol=1e-6)
    assert learnt["rounds"].tolist() == [4, 1, 3]
    lost = feedback.replace(load=jnp.zeros((2, 3)))  # neither arrived
    learnt = fedmoe.update(evidence, assignment, lost, None, hyper)
    jax.tree.map(np.testing.assert_array_equal, learnt, known)
