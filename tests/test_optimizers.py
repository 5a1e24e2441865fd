"""The optimisers of the clients, and the proximal term, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import assert_same, fill

from fedmoe_jax.optimizers import (
    add_prox,
    by_row,
    client_optimizer,
    step_weights,
)


def test_add_prox_is_the_gradient_of_the_penalty():
    shapes = {"a": np.zeros((2, 3)), "b": np.zeros(4)}
    weights, received, grads = (fill(shapes, seed) for seed in range(3))

    @jax.jit
    def penalty_gradient(weights):
        def penalty(weights):
            gap = jax.tree.map(lambda w, r: jnp.square(w - r).sum(), weights, received)
            return 0.7 / 2 * (gap["a"] + gap["b"])

        return jax.grad(penalty)(weights)

    expected = jax.tree.map(np.add, grads, penalty_gradient(weights))
    assert_same(add_prox(grads, weights, received, 0.7), expected, atol=1e-6)


def test_add_prox_pulls_a_quadratic_between_its_optimum_and_what_was_received():
    # 1/2 |w - a|^2 + mu/2 |w - r|^2 is least at w = (a + mu r) / (1 + mu)
    optimum, received, prox = np.array([4.0, 1.0]), np.array([1.0, -5.0]), 2.0
    weights = received
    for _ in range(50):
        weights = weights - 0.2 * add_prox(weights - optimum, weights, received, prox)
    np.testing.assert_allclose(weights, [2.0, -3.0], rtol=1e-6)


def two_updates(name, momentum, grads):
    """The updates of two equal gradients from one of the local optimisers."""
    tx = client_optimizer(name, jnp.float32(0.01), momentum)

    @jax.jit
    def step(grads):
        first, opt_state = tx.update(grads, tx.init(grads), grads)
        return first, tx.update(grads, opt_state, grads)[0]

    return step(jnp.asarray(grads))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_client_optimizer_sgd_with_momentum_by_hand(momentum):
    grads = np.array([5.0, -0.2, 0.0], np.float32)
    first, second = two_updates("sgd", momentum, grads)
    np.testing.assert_allclose(first, -0.01 * grads, rtol=1e-6)
    np.testing.assert_allclose(second, -0.01 * (1 + momentum) * grads, rtol=1e-6)


def test_client_optimizer_adam_steps_by_its_rate_but_for_zero_gradients():
    for update in two_updates("adam", 0.0, [5.0, -0.2, 0.0]):
        np.testing.assert_allclose(update, [-0.01, 0.01, 0], rtol=1e-4)
        assert update[2] == 0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_step_weights_count_each_gradient_in_the_delta(momentum):
    """The move of SGD with rate 1 whose gradients are all 1."""
    tx, steps = client_optimizer("sgd", jnp.float32(1.0), momentum), [1, 2, 5]
    expected = []
    for count in steps:
        place = jnp.zeros(())
        opt_state = tx.init(place)
        for _ in range(count):
            update, opt_state = tx.update(jnp.ones(()), opt_state)
            place += update
        expected.append(-float(place))
    found = step_weights(jnp.array(steps), momentum)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("tx", [optax.sgd(0.1, 0.9), optax.adam(0.1), optax.yogi(0.1)])
def test_by_row_is_the_optimiser_itself_where_every_row_is_trained(tx):
    rows = {
        "moe_0": {"kernel": np.zeros((4, 3))},
        "moe_1": {"kernel": np.zeros((4, 3))},
    }
    shapes = {"stem": {}, "gate": rows, "experts": rows, "head": {"bias": np.zeros(3)}}
    params = fill(shapes)

    @jax.jit
    def descend(params):
        found = []
        for one in (tx, by_row(tx)):
            state, at = one.init(params), params
            for _ in range(3):
                updates, state = one.update(jax.tree.map(jnp.sin, at), state, at)
                at = optax.apply_updates(at, updates)
            found.append(at)
        return found

    whole, apart = descend(params)
    assert_same(apart, whole, atol=1e-7)
