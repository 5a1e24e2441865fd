"""Expert usage: how much each expert has been trained (paper section III-B-2)."""

import jax.numpy as jnp
from jax.scipy.special import entr

from fedmoe_jax.types import Array


def update_usage(usage: Array, load: Array, decay: Array) -> Array:
    """Adds one round of load to the decayed usage.

    Args:
      usage: [E] float32 >= 0, examples.
      load: [E] float32 >= 0, examples trained through each expert this round.
      decay: [] float32 in [0, 1], what the usage keeps from round to round.

    Returns:
      [E] float32, `decay * usage + load`.
    """
    return decay * usage + load


def normalise_usage(usage: Array) -> Array:
    """Usage [E] >= 0 as a share in [0, 1] of the largest; 0 where all are 0."""
    largest = usage.max()
    return jnp.where(largest > 0, usage / jnp.where(largest > 0, largest, 1), 0.0)


def load_cv(load: Array) -> Array:
    """Coefficient of variation of the load [E]: std / mean, 0 when even or all 0."""
    mean = load.mean()
    return jnp.where(mean > 0, load.std() / jnp.where(mean > 0, mean, 1), 0.0)


def load_entropy(load: Array) -> Array:
    """Entropy of the load [E] as a share in [0, 1] of log E, 1 when even or all 0."""
    num_experts, total = load.shape[0], load.sum()
    share = jnp.where(total > 0, load / jnp.where(total > 0, total, 1), 1 / num_experts)
    if num_experts == 1:
        return jnp.ones_like(total)
    return jnp.clip(entr(share).sum() / jnp.log(num_experts), 0.0, 1.0)


def starved(load: Array) -> Array:
    """[] int32, number of experts with less than a tenth of the mean load [E]."""
    return jnp.sum(load < 0.1 * load.mean(), dtype=jnp.int32)
