"""Random laws of the world's processes: of all clients at once, one step a call.

Every process is stationary, and a step with `persistence` 0 draws its stationary
distribution whatever the state before: that is how to start one.
"""

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array


def markov_start(key: Array, share: Array, num_clients: int) -> Array:
    """[N] bool from the stationary law of `markov_step`."""
    return markov_step(key, jnp.zeros(num_clients, bool), share, jnp.zeros(()))


def markov_step(key: Array, state: Array, share: Array, persistence: Array) -> Array:
    """One step of a two-state Markov chain, such as on and off, of every client.

    A client keeps its state with probability `persistence` and else draws it anew.
    The stationary share is `share`; over k steps the correlation is `persistence**k`,
    and a client stays true for `1 / ((1 - persistence) (1 - share))` steps on average.

    Args:
      key: a JAX key, consumed.
      state: [N] bool.
      share: [] or [N] float32 in [0, 1], probability of a new state being true.
      persistence: [] float32 in [0, 1]; 0 is independent from step to step.

    Returns:
      [N] bool.
    """
    chex.assert_rank([state, share, persistence], [1, {0, 1}, 0])
    key_keep, key_draw = jax.random.split(key)
    keep = jax.random.bernoulli(key_keep, persistence, state.shape)
    drawn = jax.random.bernoulli(key_draw, share, state.shape)
    return jnp.where(keep, state, drawn)


def gauss_markov_start(key: Array, shape: tuple[int, ...]) -> Array:
    """Float32 of a shape from the stationary law of `gauss_markov_step`, N(0, 1)."""
    return gauss_markov_step(key, jnp.zeros(shape), jnp.zeros(()))


def gauss_markov_step(key: Array, latent: Array, persistence: Array) -> Array:
    """One step of a Gauss-Markov process (AR(1)): `r z + sqrt(1 - r^2) n`, n ~ N(0, 1).

    Entries are independent; each is stationary at N(0, 1), and over k steps the
    correlation is `r**k`.

    Args:
      key: a JAX key, consumed.
      latent: z, [...] float32.
      persistence: r, [] float32 in [0, 1]; 1 returns `latent` bit by bit.

    Returns:
      [...] float32 like `latent`.
    """
    chex.assert_rank(persistence, 0)
    noise = jax.random.normal(key, latent.shape)
    return persistence * latent + jnp.sqrt(1 - persistence**2) * noise


def taken_share(latent: Array, most: Array) -> Array:
    """Background load: the share of the compute that a client's other work takes.

    Uniform on [0, most] where the latent is N(0, 1) (a Gaussian copula). Latents of
    correlation rho give shares of correlation `6 / pi * asin(rho / 2)`.

    Args:
      latent: [...] float32, see `gauss_markov_step`.
      most: [] float32 in [0, 1), so that some compute is always left.

    Returns:
      [...] float32 in [0, most].
    """
    return most * jax.scipy.stats.norm.cdf(latent)


def speed_factor(latent: Array, spread: Array) -> Array:
    """Log-normal factor of mean one, such as of bandwidth: `exp(s z - s^2 / 2)`.

    Its variance is `exp(s^2) - 1` where the latent is N(0, 1). Latents of correlation
    rho give factors of correlation `(exp(s^2 rho) - 1) / (exp(s^2) - 1)`.

    Args:
      latent: z, [...] float32, see `gauss_markov_step`.
      spread: s, [] float32 >= 0, standard deviation of the logarithm; 0 gives ones.

    Returns:
      [...] float32 > 0.
    """
    return jnp.exp(spread * latent - spread**2 / 2)
