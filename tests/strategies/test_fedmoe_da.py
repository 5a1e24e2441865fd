"""FedMoE-DA: mixtures of similar experts by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_hyper

from fedmoe_jax.strategies import fedmoe_da

pytestmark = pytest.mark.slow


def test_mixing_weights_are_of_the_most_similar():
    rows = jnp.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [-1.0, 0.1]])
    similar = fedmoe_da.find_similar(rows)
    weights = fedmoe_da.mixing_weights(similar, jnp.float32(1), jnp.float32(0.5))
    unit = np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    scaled = np.exp(unit @ unit.T / 0.5)
    for i, j in ((0, 1), (1, 0), (2, 0), (3, 2)):  # the nearest other of each
        total = scaled[i, i] + scaled[i, j]
        np.testing.assert_allclose(weights[i, j], scaled[i, j] / total, rtol=1e-5)
        np.testing.assert_allclose(weights[i, i], scaled[i, i] / total, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (np.asarray(weights) > 0).sum() == 8


def test_exchange_mixes_the_cohort_and_renews_its_weights_every_period():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    personal = {
        "gate": {"moe": {"kernel": draw(3, 2, 3)}},
        "experts": {"moe": {"w": draw(3, 2, 5)}},
    }
    hyper = make_hyper()  # five neighbours, a period of 5
    one_layer = fedmoe_da.init(SIZES._replace(num_clients=3, num_experts=2))
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
        similar = fedmoe_da.find_similar(rows)
        weights = fedmoe_da.mixing_weights(similar, jnp.float32(5), jnp.float32(1))
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


def test_count_sent_counts_what_travels_once():
    mixing = np.eye(6)  # three clients of two experts
    mixing[0, [1, 2, 5]] = mixing[1, 2] = 0.1
    sent, received = fedmoe_da.count_sent(jnp.asarray(mixing), 2)
    assert received.tolist() == [2, 0, 0]  # its own second expert travels nowhere
    assert sent.tolist() == [0, 1, 1]


def assert_trees_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left, right)
