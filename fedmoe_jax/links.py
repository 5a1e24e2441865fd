"""The links of a batch of examples: Rayleigh fading, what is known of it, and time.

Fading is drawn for every example and every expert, and stands still for that example.
In evaluation the draws are of the run's key and the example's place, the same after
every round.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Links
from fedmoe_jax.types import Array, ExpertLinks, Hyper
from fedmoe_jax.world.channel import fading_power, known_fading

TRAINING = 1503  # purpose, folded into the key of a local step
TESTING = 2**32 - 7  # purpose, folded into the run's key as the numbers of rounds are


def see_share(snr: Array) -> Array:
    """`-log(1 + 1 / SNR)`: the log of the signal's share in what arrives.

    It is 0 for a perfect link and follows log SNR where there is little signal. So the
    gate needs no scale of its own for decibels, and perfect links leave it a plain one:
    this project's choice.

    Args:
      snr: [...] float32 > 0, linear.
    """
    return -jnp.log1p(1 / snr)


def take_time(snr: Array, airtime: Array) -> Array:
    """`min(1, airtime / log2(1 + SNR))` deadlines of an answer, at Shannon's rate.

    An answer that has not come by its deadline is waited for no longer.

    Args:
      snr: [...] float32 > 0, linear.
      airtime: [] float32 > 0, at an SNR of 1.
    """
    return jnp.minimum(1.0, airtime * jnp.log(2.0) / jnp.log1p(snr))


def draw_links(key: Array, mean: Array, hyper: Hyper) -> Links:
    """The links of a batch.

    Args:
      key: [B], of each example, not consumed.
      mean: [E] float32 > 0, linear; infinity for perfect links.
      hyper: gives the group `expert_links`.
    """
    numbers = hyper.expert_links

    def draw(key: Array) -> tuple[Array, Array, Array]:
        fading_key, known_key, noise_key = jax.random.split(key, 3)
        fading = jax.random.normal(fading_key, (*mean.shape, 2))
        known = known_fading(known_key, fading, numbers.csi)
        return mean * fading_power(fading), mean * fading_power(known), noise_key

    snr, known, noise_key = jax.vmap(draw)(key)
    return Links(
        snr=snr,
        seen=numbers.sight * see_share(known),
        charge=numbers.price * take_time(known, numbers.airtime),
        time=take_time(snr, numbers.airtime),
        key=noise_key,
    )


def draw_training(key: Array, links: ExpertLinks, count: int, hyper: Hyper) -> Links:
    """The links of a local step, perfect ones while these are not simulated.

    Args:
      key: of the step, not consumed.
      links: of ONE client.
      count: B.
      hyper: gives the group `expert_links`.
    """
    keys = jax.random.split(jax.random.fold_in(key, TRAINING), count)
    return draw_links(keys, jnp.where(links.simulated, links.snr, jnp.inf), hyper)


def draw_testing(
    run_key: Array, links: ExpertLinks, position: Array, hyper: Hyper
) -> Links:
    """The links of test examples at `position` [B] int32 of their pass."""
    key = jax.random.fold_in(run_key, TESTING)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
    return draw_links(keys, links.snr, hyper)
