"""Every client's own label prior, which it knows without any test example."""

from typing import NamedTuple

import jax.numpy as jnp

from fedmoe_jax.types import Array

FLOOR = 1e-3  # of a share, so that a label that a client lacks is not impossible


class Priors(NamedTuple):
    """The priors of m clients, those of one model side by side.

    Attributes:
      row: [m] int32, the clients' rows of the panel.
      log_share: [m, L] float32, log(label histogram + 1e-3), L the classes alone.
      start: [models + 1] int32, the first client of each model, and m.
    """

    row: Array
    log_share: Array
    start: Array


def gather_priors(
    label_mix: Array, model: Array, row: Array, num_models: int
) -> Priors:
    """The priors of some clients.

    Args:
      label_mix: [n, L] float32 of the classes, rows sum to 1.
      model: [n] int32 in [0, num_models), the model of each client.
      row: [m] int32, the clients.
      num_models: at most so many are scored.
    """
    row = row[jnp.argsort(model[row], stable=True)]
    count = jnp.zeros(num_models + 1, jnp.int32).at[model[row] + 1].add(1)
    return Priors(row, jnp.log(label_mix[row] + FLOOR), count.cumsum())
