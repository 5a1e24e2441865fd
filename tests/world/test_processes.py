"""Random processes: moments and correlations against closed forms.

Each estimate is a mean over many independent clients; it may be off by four standard
errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.world.processes import (
    gauss_markov_step,
    markov_step,
    speed_factor,
    taken_share,
)

CLIENTS = 100_000


def about(samples, expected):
    """Whether the samples' mean is within four standard errors of what it should be."""
    samples = np.asarray(samples, np.float64)
    error = samples.std() / np.sqrt(samples.size)
    assert error > 0
    assert abs(samples.mean() - expected) < 4 * error, (samples.mean(), expected, error)


def correlated(first, second, mean, variance, expected):
    """Whether two samples of known moments are correlated as expected."""
    first, second = (np.asarray(x, np.float64) - mean for x in (first, second))
    about(first * second / variance, expected)


def path(step, start, steps, seed=0):
    """The states after 0, 1, ... `steps` steps, [steps + 1, ...]."""

    def body(state, key):
        return step(key, state), state

    keys = jax.random.split(jax.random.key(seed), steps)
    last, states = jax.jit(lambda: jax.lax.scan(body, start, keys))()
    return np.concatenate([states, last[None]])


def normal(seed):
    return jax.random.normal(jax.random.key(seed), (CLIENTS,))


# --- markov_step


@pytest.mark.parametrize(("share", "persistence"), [(0.3, 0.8), (0.9, 0.5), (0.5, 0.0)])
def test_markov_step_stays_stationary_and_forgets_geometrically(share, persistence):
    start = jax.random.bernoulli(jax.random.key(1), share, (CLIENTS,))
    step = lambda key, state: markov_step(
        key, state, jnp.float32(share), jnp.float32(persistence)
    )
    states = path(step, start, 4)
    assert states.dtype == bool and states.shape == (5, CLIENTS)
    about(states[-1], share)
    for lag in (1, 4):
        variance = share * (1 - share)
        correlated(states[0], states[lag], share, variance, persistence**lag)


def test_markov_step_changes_sides_as_often_as_its_mean_stay_says():
    share, persistence = jnp.float32(0.3), jnp.float32(0.8)
    here = jnp.ones(CLIENTS, bool)
    about(~markov_step(jax.random.key(2), here, share, persistence), 0.2 * 0.7)
    about(markov_step(jax.random.key(2), ~here, share, persistence), 0.2 * 0.3)


def test_markov_step_has_a_share_of_every_client():
    share = jnp.repeat(jnp.array([0.0, 0.2, 0.7, 1.0]), CLIENTS // 4)
    start = jnp.zeros(CLIENTS, bool)
    states = markov_step(jax.random.key(3), start, share, jnp.float32(0)).reshape(4, -1)
    assert not states[0].any() and states[3].all()
    about(states[1], 0.2)
    about(states[2], 0.7)


def test_markov_step_that_persists_never_changes():
    start = jax.random.bernoulli(jax.random.key(1), 0.5, (CLIENTS,))
    after = markov_step(jax.random.key(4), start, jnp.float32(0.5), jnp.float32(1))
    assert jnp.array_equal(after, start)


def test_markov_step_moves_clients_independently():
    start = jnp.zeros(CLIENTS, bool)
    states = markov_step(jax.random.key(5), start, jnp.float32(0.5), jnp.float32(0.2))
    correlated(states[::2], states[1::2], 0.4, 0.4 * 0.6, 0.0)


# --- gauss_markov_step


@pytest.mark.parametrize("persistence", [0.0, 0.6, 0.95])
def test_gauss_markov_step_stays_standard_normal_and_forgets_geometrically(persistence):
    step = lambda key, latent: gauss_markov_step(key, latent, jnp.float32(persistence))
    latents = path(step, normal(1), 4)
    about(latents[-1], 0)
    about(latents[-1] ** 2, 1)
    about(latents[-1] ** 4, 3)
    for lag in (1, 4):
        correlated(latents[0], latents[lag], 0, 1, persistence**lag)


def test_gauss_markov_step_that_persists_stays_bit_by_bit():
    latent = normal(3)
    assert jnp.array_equal(
        gauss_markov_step(jax.random.key(4), latent, jnp.float32(1)), latent
    )


def test_gauss_markov_step_of_any_shape_is_independent():
    latent = gauss_markov_step(
        jax.random.key(5), jnp.zeros((CLIENTS, 2)), jnp.float32(0)
    )
    correlated(latent[:, 0], latent[:, 1], 0, 1, 0)
    correlated(latent[:-1, 0], latent[1:, 0], 0, 1, 0)


# --- what the latents stand for


def test_taken_share_by_hand():
    latent = jnp.array([-jnp.inf, 0.0, 1.959964, jnp.inf])
    share = taken_share(latent, jnp.float32(0.8))
    np.testing.assert_allclose(share, [0, 0.4, 0.78, 0.8], atol=1e-6)


def test_taken_share_is_uniform():
    share = taken_share(normal(6), jnp.float32(0.5))
    for power in (1, 2, 3):
        about(share**power, 0.5**power / (power + 1))
    about(share < 0.1, 0.2)


@pytest.mark.parametrize("persistence", [0.6, 0.9])
def test_taken_share_is_correlated_as_its_copula_says(persistence):
    latent = normal(7)
    later = gauss_markov_step(jax.random.key(8), latent, jnp.float32(persistence))
    shares = [taken_share(z, jnp.float32(0.6)) for z in (latent, later)]
    expected = 6 / np.pi * np.arcsin(persistence / 2)
    correlated(*shares, 0.3, 0.6**2 / 12, expected)


def test_speed_factor_has_mean_one():
    spread = 0.5
    factor = speed_factor(normal(9), jnp.float32(spread))
    assert factor.min() > 0
    about(factor, 1)
    about((factor - 1) ** 2, np.expm1(spread**2))
    about(jnp.log(factor), -(spread**2) / 2)


def test_speed_factor_is_correlated_like_log_normals():
    spread, persistence = 0.5, 0.8
    latent = normal(10)
    later = gauss_markov_step(jax.random.key(11), latent, jnp.float32(persistence))
    factors = [speed_factor(z, jnp.float32(spread)) for z in (latent, later)]
    variance = np.expm1(spread**2)
    expected = np.expm1(spread**2 * persistence) / variance
    correlated(*factors, 1, variance, expected)


def test_speed_factor_without_spread_is_one():
    assert jnp.all(speed_factor(normal(12), jnp.float32(0)) == 1)
