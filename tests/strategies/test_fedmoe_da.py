"""FedMoE-DA: mixtures of similar experts by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_hyper

from fedmoe_jax.strategies import fedmoe_da

pytestmark = pytest.mark.slow


def cosines(rows):
    unit = np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def dense_weights(similar, neighbours, temperature):
    """[n, n] shares of all experts, each a softmax over itself and the nearest."""
    weights = np.zeros_like(similar)
    for i, row in enumerate(similar):
        others = [j for j in np.argsort(-row, kind="stable") if j != i]
        chosen = [i, *others[:neighbours]]
        weights[i, chosen] = np.exp(row[chosen] / temperature)
    return weights / weights.sum(1, keepdims=True)


def test_mixing_weights_are_of_the_most_similar():
    rows = jnp.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [-1.0, 0.1]])
    similar = cosines(rows)
    order, shares = fedmoe_da.mixing_weights(
        jnp.asarray(similar, jnp.float32), jnp.arange(4), jnp.int32(1), jnp.float32(0.5)
    )
    weights = np.zeros((4, 4))
    np.put_along_axis(weights, np.asarray(order), np.asarray(shares), axis=1)
    scaled = np.exp(similar / 0.5)
    for i, j in ((0, 1), (1, 0), (2, 0), (3, 2)):  # the nearest other of each
        total = scaled[i, i] + scaled[i, j]
        np.testing.assert_allclose(weights[i, j], scaled[i, j] / total, rtol=1e-5)
        np.testing.assert_allclose(weights[i, i], scaled[i, i] / total, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (np.asarray(weights) > 0).sum() == 8
    np.testing.assert_allclose(weights, dense_weights(similar, 1, 0.5), rtol=1e-5)


@pytest.mark.parametrize("neighbours", [1, 4, 40])
def test_exchange_equals_the_matrix_of_all_pairs(neighbours):
    """Nine clients of three experts, in a cohort of seven, one of which is late."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    personal = {
        "gate": {"moe": {"kernel": draw(9, 3, 4)}},
        "experts": {"moe": {"w": draw(9, 3, 5, 2), "b": draw(9, 3)}},
    }
    sizes = SIZES._replace(num_clients=9, num_experts=3, gate_width=4)
    state = jax.tree.map(lambda leaf: leaf[None], fedmoe_da.init(sizes))
    cohort = np.array([8, 1, 4, 0, 3, 7, 2])
    arrived = np.array([1, 1, 0, 1, 1, 1, 1], bool)
    hyper = make_hyper(fedmoe_da={"neighbours": neighbours, "temperature": 0.3})
    evidence = SimpleNamespace(round=jnp.int32(0), client=jnp.asarray(cohort))
    mixed, state, sent, received = fedmoe_da.exchange(
        personal, state, evidence, jnp.asarray(arrived), hyper
    )
    there = cohort[arrived]
    rows = np.asarray(personal["gate"]["moe"]["kernel"])[there].reshape(18, 4)
    weights = dense_weights(cosines(rows), neighbours, 0.3)
    for name, leaf in personal["experts"]["moe"].items():
        expected = np.array(leaf)
        flat = expected[there].reshape(18, -1)
        expected[there] = (weights @ flat).reshape(expected[there].shape)
        found = mixed["experts"]["moe"][name]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    taken = (weights > 0).reshape(6, 3, 6, 3).any(axis=1).sum(axis=2)
    np.fill_diagonal(taken, 0)
    np.testing.assert_array_equal(np.asarray(sent)[arrived], taken.sum(axis=0))
    np.testing.assert_array_equal(np.asarray(received)[arrived], taken.sum(axis=1))
    assert sent[2] == received[2] == 0
    shown = np.asarray(state["shown"][0])
    assert not shown[[4, 5, 6]].any() and shown[there].all()


def test_exchange_mixes_the_cohort_and_renews_its_weights_every_period():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    personal = {
        "gate": {"moe": {"kernel": draw(3, 2, 3)}},
        "experts": {"moe": {"w": draw(3, 2, 5)}},
    }
    hyper = make_hyper()  # five neighbours, a period of 5
    sizes = SIZES._replace(num_clients=3, num_experts=2, gate_width=3)
    one_layer = fedmoe_da.init(sizes)
    state = jax.tree.map(lambda leaf: leaf[None], one_layer)
    mine = np.array([4, 5, 0, 1])  # the experts of clients 2 and 0
    both_arrived = jnp.ones(2, bool)
    for number, fresh in ((3, False), (5, True), (6, True)):
        evidence = SimpleNamespace(
            round=jnp.int32(number), client=jnp.array([2, 0], jnp.int32)
        )
        mixed, state, *moved = fedmoe_da.exchange(
            personal, state, evidence, both_arrived, hyper
        )
        rows = personal["gate"]["moe"]["kernel"].reshape(6, 3)[mine]
        weights = dense_weights(cosines(rows), 5, 1.0)
        weights = weights if fresh else np.eye(4)  # no client has shown its rows yet
        expected = np.array(personal["experts"]["moe"]["w"]).reshape(6, 5)
        expected[mine] = weights @ expected[mine]
        np.testing.assert_allclose(
            mixed["experts"]["moe"]["w"].reshape(6, 5), expected, rtol=1e-5, atol=1e-6
        )
        assert mixed["gate"] is personal["gate"]
        both = [2.0, 2.0] if fresh else [0.0, 0.0]  # each gets the other's two experts
        assert [count.tolist() for count in moved] == [both, both]
        if number == 5:  # from then on other rows change nothing until the next renewal
            old = personal["gate"]["moe"]["kernel"]
            other = personal | {"gate": {"moe": {"kernel": -old[::-1]}}}
            later = SimpleNamespace(round=jnp.int32(6), client=evidence.client)
            again, *_ = fedmoe_da.exchange(other, state, later, both_arrived, hyper)
            assert_trees_close(again["experts"], mixed["experts"])
            alone = jnp.array([True, False])  # the other's round did not count
            still, _, *moved = fedmoe_da.exchange(
                personal, state, evidence, alone, hyper
            )
            rest = lambda tree: jax.tree.map(
                lambda leaf: leaf[:2], tree
            )  # not client 2
            assert_trees_close(rest(still["experts"]), rest(personal["experts"]))
            assert [count.tolist() for count in moved] == [[0, 0], [0, 0]]


def test_count_taken_counts_what_travels_once():
    """Two experts of client 0 of three; both mix with 2, one with 1 and 5, too."""
    order = jnp.array([[0, 1, 2, 5, 3, 4], [1, 2, 0, 3, 4, 5]])
    weights = jnp.array([[0.7, 0.1, 0.1, 0.1, 0, 0], [0.9, 0.1, 0, 0, 0, 0]])
    taken = fedmoe_da.count_taken(order, weights, jnp.int32(0))
    assert taken.tolist() == [0, 1, 1]  # its own second expert travels nowhere


def assert_trees_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left, right)
