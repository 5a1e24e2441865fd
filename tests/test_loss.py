"""Feedback and objective of positions with weights, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import Routing, Scores
from fedmoe_jax.loss import mean_loss, sum_batch, summarise_feedback

LOSS = jnp.array([1.0, 2.0, 4.0])
SCORE = jnp.array([1.0, 0.0, 1.0])
GATES = jnp.array([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])


def summarise(weight, gates=GATES[None]):
    sums = sum_batch(
        Scores(LOSS, SCORE, weight), Routing(None, gates), None, len(gates)
    )
    return sums, summarise_feedback(sums)


def test_feedback_counts_positions_by_their_gates():
    sums, feedback = summarise(None)
    np.testing.assert_allclose(feedback.accuracy, [[1.5 / 1.75, 0.5 / 1.25]])
    np.testing.assert_allclose(feedback.loss, [[3.5 / 1.75, 3.5 / 1.25]])
    np.testing.assert_allclose(feedback.frequency, [[1.75 / 3, 1.25 / 3]])
    np.testing.assert_array_equal(feedback.load, [[3, 2]])
    np.testing.assert_allclose(feedback.peak, [[1.0, 0.75]])
    assert sums.weight is None and sums.total_loss == 7 and sums.total_score == 2


def test_equal_weights_change_nothing_but_the_scale():
    plain, weighted = summarise(None)[1], summarise(jnp.full(3, 2.0))[1]
    jax.tree.map(np.testing.assert_allclose, plain, weighted)
    scores = Scores(LOSS, SCORE, jnp.full(3, 2.0))
    np.testing.assert_allclose(mean_loss(scores), LOSS.mean(), rtol=1e-6)


def test_padding_counts_nowhere():
    weight = jnp.array([1.0, 0.5, 0.0])
    sums, feedback = summarise(weight)
    np.testing.assert_allclose(feedback.accuracy, [[1 / 1.125, 0]])
    np.testing.assert_allclose(feedback.loss, [[1.25 / 1.125, 2.0]])
    np.testing.assert_allclose(feedback.frequency, [[0.75, 0.25]])
    np.testing.assert_array_equal(feedback.load, [[2, 1]])
    np.testing.assert_allclose(feedback.peak, [[1.0, 0.75]])
    assert sums.weight == 1.5 and sums.total_loss == 2 and sums.total_score == 1
    np.testing.assert_allclose(mean_loss(Scores(LOSS, SCORE, weight)), 2 / 1.5)


def test_every_layer_has_feedback_of_its_own():
    gates = jnp.stack([GATES, GATES[:, ::-1]])
    _, both = summarise(jnp.array([1.0, 0.5, 0.0]), gates)
    for layer in range(2):
        _, one = summarise(jnp.array([1.0, 0.5, 0.0]), gates[layer : layer + 1])
        jax.tree.map(
            lambda x, y, g=layer: np.testing.assert_allclose(x[g], y[0]), both, one
        )
