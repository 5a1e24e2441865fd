"""The optimisers of the clients, and the proximal term, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import assert_same, fill, make_config

from fedmoe_jax.config import validate
from fedmoe_jax.optimizers import (
    add_prox,
    by_row,
    client_optimizer,
    rate_share,
    schedule_rates,
    server_optimizer,
    step_weights,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.program import make_hyper, make_static


def settings_of(side, **changes):
    """The static settings of `client` or `server`, some changed."""
    config = make_config(**{f"{side}.{name}": x for name, x in changes.items()})
    return getattr(make_static(config), side)


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
    settings = settings_of("client", optimizer=name, momentum=momentum)
    tx = client_optimizer(settings, jnp.float32(0.01))

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
    settings = settings_of("client", optimizer="sgd", momentum=momentum)
    tx, steps = client_optimizer(settings, jnp.float32(1.0)), [1, 2, 5]
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


def client_update(grads, params, **changes):
    """The first update of a local optimiser with rate 0.1."""
    tx = client_optimizer(settings_of("client", **changes), jnp.float32(0.1))
    arrays = jax.tree.map(jnp.asarray, (grads, params))
    return tx.update(arrays[0], tx.init(arrays[1]), arrays[1])[0]


def test_clients_clip_by_the_norm_of_the_whole_submodel():
    grads = {"stem": np.float32([3.0, 0.0]), "head": np.float32([[4.0]])}  # norm 5
    for most, share in ((1.0, 0.2), (2.5, 0.5), (5.0, 1.0), (7.0, 1.0), (0.0, 1.0)):
        found = client_update(grads, grads, clip=most)
        expected = jax.tree.map(lambda g, s=share: -0.1 * s * g, grads)
        assert_same(found, expected, rtol=1e-6)


def test_a_gradient_that_is_not_finite_stays_so():
    found = client_update(np.float32([np.inf, 1.0]), np.float32([0, 0]), clip=1.0)
    assert not np.isfinite(found).all()


def test_weight_decay_by_hand():
    grads, params = np.float32([0.5, -0.5]), np.float32([10.0, 0.0])
    found = client_update(grads, params, weight_decay=0.01)
    np.testing.assert_allclose(found, -0.1 * (grads + [0.1, 0.0]), rtol=1e-6)
    # Clipped before: what is clipped is the loss's gradient.
    found = client_update(grads, params, weight_decay=0.01, clip=0.5**0.5 / 2)
    np.testing.assert_allclose(found, -0.1 * (grads / 2 + [0.1, 0.0]), rtol=1e-5)
    # AdamW's first step is a sign, and weights decay apart from it.
    found = client_update(grads, params, optimizer="adamw", weight_decay=0.01)
    np.testing.assert_allclose(found, [-0.1 * (1 + 0.1), 0.1], rtol=1e-4)


def make_server(**changes):
    params = {"stem": {"bias": jnp.zeros(2)}}
    settings = settings_of("server", **changes)
    tx = server_optimizer(settings, jnp.float32(0.01))
    return tx, params, tx.init(params)


def test_fedadam_is_algorithm_2_of_its_paper():
    tx, params, state = make_server(optimizer="fedadam")
    mean, square, tau = np.zeros(2), np.full(2, 1e-6), 1e-3
    deltas = np.random.default_rng(0).normal(0, 0.01, (12, 2))
    for delta in deltas:
        grads = {"stem": {"bias": -jnp.float32(delta)}}
        updates, state = tx.update(grads, state, params)
        mean = 0.9 * mean + 0.1 * delta
        square = 0.99 * square + 0.01 * delta**2
        expected = 0.01 * mean / (np.sqrt(square) + tau)
        np.testing.assert_allclose(updates["stem"]["bias"], expected, rtol=1e-4)


def test_fedadam_starts_slower_than_adam_and_then_steps_further():
    """Of a constant mean delta of 0.003; adam's steps are all alike."""
    found = {}
    for name in ("fedadam", "adam"):
        tx, params, state = make_server(optimizer=name)
        grads, steps = {"stem": {"bias": jnp.full(2, -0.003)}}, []
        for _ in range(10):
            updates, state = tx.update(grads, state, params)
            steps.append(float(updates["stem"]["bias"][0]))
        found[name] = np.array(steps)
    first = 0.01 * 0.0003 / (np.sqrt(0.99e-6 + 9e-8) + 1e-3)
    np.testing.assert_allclose(found["fedadam"][0], first, rtol=1e-4)
    np.testing.assert_allclose(found["adam"][0], 0.01 * 0.003 / 0.004, rtol=1e-4)
    assert found["fedadam"][0] < found["adam"][0] and found["fedadam"][-1] > 0.008


def test_the_server_clips_the_whole_mean_delta_and_keeps_its_state():
    tx, params, state = make_server(optimizer="sgd", clip=1.0)
    plain, *_ = make_server(optimizer="sgd")
    grads = {"stem": {"bias": jnp.array([3.0, 4.0])}}
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["stem"]["bias"], [-0.006, -0.008], rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))


def test_the_server_decays_weights():
    for name in ("sgd", "adamw"):
        tx, _, _ = make_server(optimizer=name, weight_decay=0.5)
        params = {"stem": {"bias": jnp.array([1.0, -2.0])}}
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["stem"]["bias"], [-0.005, 0.01], rtol=1e-5)


def shares(**changes):
    settings = settings_of("client", **changes)
    return [float(rate_share(settings, jnp.int32(r))) for r in range(9)]


def test_a_rate_warms_up_and_falls_along_half_a_cosine():
    np.testing.assert_allclose(
        shares(warm_up=3), [0.25, 0.5, 0.75, *[1.0] * 6], rtol=1e-6
    )
    half = 0.5 * (1 + np.cos(np.pi * np.arange(5) / 4))
    falling = shares(cosine_rounds=4, floor=0.2)
    expected = [*(0.2 + 0.8 * half), *[0.2] * 4]
    np.testing.assert_allclose(falling, expected, atol=1e-6)
    both = shares(warm_up=2, cosine_rounds=6)
    np.testing.assert_allclose(both, [1 / 3, 2 / 3, *half, 0, 0], atol=1e-6)


def test_rates_without_a_schedule_are_not_touched():
    config = make_config()
    hyper = make_hyper(config)
    assert schedule_rates(hyper, jnp.int32(3), make_static(config)) is hyper


def test_each_side_has_its_own_schedule():
    config = make_config(**{"server.warm_up": 1, "client.cosine_rounds": 2})
    hyper = schedule_rates(make_hyper(config), jnp.int32(1), make_static(config))
    np.testing.assert_allclose(hyper.client.learning_rate, 0.01, rtol=1e-6)
    np.testing.assert_allclose(hyper.server.learning_rate, 1.0, rtol=1e-6)


def test_a_warm_up_beyond_its_cosine_is_refused():
    config = make_config(**{"server.warm_up": 4, "server.cosine_rounds": 4})
    told = "server.cosine_rounds=4 is not allowed; allowed: 0, or more than server.warm"
    with pytest.raises(UserError, match=told):
        validate(config)
