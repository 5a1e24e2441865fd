"""Who can be reached, who is asked to take part, and who drops out."""

import jax
import jax.numpy as jnp

from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array


def reach_share(round: Array, phase: Array, *, share, swing, day) -> Array:
    """The share of the time that each client can be reached at this time of its day.

    `share + swing sin(2 pi (round / day + phase))`, within [0, 1].

    Args:
      round: [] int32.
      phase: [N] float32 in [0, 1), where on the globe each client lives.
      share: [] in [0, 1], the mean over a day where nothing is cut off.
      swing: [] >= 0.
      day: [] rounds in a day, >= 1.

    Returns:
      [N] float32 in [0, 1].
    """
    wave = jnp.sin(2 * jnp.pi * (round / day + phase))
    return jnp.clip(share + swing * wave, 0.0, 1.0)


def sample_cohort(key: Array, num_clients: int, cohort_size: int) -> Array:
    """Draws the clients of one round uniformly, without replacement.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      cohort_size: C; with C = N everyone takes part and nothing is drawn.

    Returns:
      [C] int32 client ids in ascending order.

    Raises:
      UserError: if `cohort_size` is not in [1, num_clients].
    """
    if not 1 <= cohort_size <= num_clients:
        raise UserError(
            f"cohort_size={cohort_size} is not allowed; it lies in "
            f"[1, num_clients={num_clients}]"
        )
    if cohort_size == num_clients:
        return jnp.arange(num_clients, dtype=jnp.int32)
    chosen = jax.random.choice(key, num_clients, (cohort_size,), replace=False)
    return jnp.sort(chosen.astype(jnp.int32))


def sample_weighted(key: Array, weight: Array, cohort_size: int) -> Array:
    """Draws clients one after the other, each in proportion to its weight.

    By the Gumbel top-k trick, which is the same as drawing without replacement. Where
    fewer than C clients have weight, the rest of the cohort are clients without any.

    Args:
      key: a JAX key, consumed.
      weight: [N] float32 >= 0.
      cohort_size: C <= N.

    Returns:
      [C] int32 client ids in ascending order.
    """
    luck = jax.random.gumbel(key, weight.shape)
    merit = jnp.where(weight > 0, jnp.log(jnp.maximum(weight, 1e-30)), -1e4)
    chosen = jax.lax.top_k(merit + luck, cohort_size)[1]
    return jnp.sort(chosen.astype(jnp.int32))


def draw_dropout(key: Array, num_clients: int, *, rate: Array, early: Array) -> Array:
    """After which share of its training each client would be lost in this round.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      rate: [] chance of being lost.
      early: [] share of the lost that never start training; others are lost at a
        uniform moment of it.

    Returns:
      [N] float32: 0 for before, in (0, 1) for during training, infinity for never.
    """
    lost, before, moment = jax.random.split(key, 3)
    lost = jax.random.bernoulli(lost, rate, (num_clients,))
    before = jax.random.bernoulli(before, early, (num_clients,))
    moment = jax.random.uniform(moment, (num_clients,), minval=1e-6)
    return jnp.where(lost, jnp.where(before, 0.0, moment), jnp.inf)
