"""Weak devices that are out of reach more often than strong ones.

State: [N] float32, standard normal latents. The server of the paper meets clients whose
availability follows their capacity (section IV-D); the form is this project's choice.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import SHARE, TRACED, Option
from fedmoe_jax.types import Array, Hyper, Keys, Sizes
from fedmoe_jax.world.availability import PERSISTENCE
from fedmoe_jax.world.processes import gauss_markov_start, gauss_markov_step
from fedmoe_jax.world.step import BIAS, View


def has_bias(config: ConfigDict) -> bool:
    """Whether weak devices are ever out of reach for their weakness."""
    return config.availability.capacity_bias > 0


def count_stronger(memory: Array) -> Array:
    """The share of the population with more memory than each client: [N] in [0, 1).

    Args:
      memory: [N] float32, bytes.
    """
    place = jnp.searchsorted(jnp.sort(memory), memory, side="right")
    return 1 - place / memory.shape[0]


def init_bias(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """Draws from the stationary law."""
    return gauss_markov_start(keys.of(BIAS), (sizes.num_clients,))


def step_bias(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """One step of a Gauss-Markov process of every client."""
    return gauss_markov_step(keys.of(BIAS), state, hyper.availability.persistence)


def apply_bias(state: Array, view: View, hyper: Hyper) -> View:
    """Puts a client out of reach in the share `capacity_bias w` of the time.

    w is the share of clients with more memory, of all that their devices have: pressure
    on it for a while makes nobody harder to reach. A client is there while its latent
    is below the quantile `1 - capacity_bias w` of the normal law (a Gaussian copula).
    """
    weak = count_stronger(view.federation.devices.memory)
    there = 1 - hyper.availability.capacity_bias * weak
    now = jax.scipy.stats.norm.cdf(state) < there
    reachable = view.events.reachable & now
    return view.replace(events=view.events.replace(reachable=reachable))


BIAS_PROCESS = Process(
    about="Clients with weak devices are out of reach more often, in spells.",
    is_on=has_bias,
    init=init_bias,
    step=step_bias,
    apply=apply_bias,
    options=(
        Option(
            "availability.capacity_bias",
            SHARE,
            "share of the time that a client is out of reach where all others have "
            "more memory, less in proportion to their share; 0: none is for that",
            TRACED,
        ),
        PERSISTENCE,
    ),
)
