"""Features over noisy links to the experts, and a gate that sees the links.

The channel-aware gate of Song et al. (arXiv 2504.00819), from its abstract: the gate's
input is the features and each expert's SNR, and features that are sent to an expert get
noise by it. The form of both is this project's choice.
"""

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.base import Links
from fedmoe_jax.types import Array

SNR = "snr"  # leaf of a gate: what its rows have learnt of their links
TINY = 1e-12  # so that features of which all are 0 have a gradient


def see_links(logits: Array, snr: Array, links: Links) -> Array:
    """`logits_e = w_e h + v_e s_e - price T_e` (arXiv 2504.00819; price: this project).

    Args:
      logits: [B, E] float32, `w_e h` with the gate's bias.
      snr: [E] float32, v, learnt.
      links: to the experts.
    """
    chex.assert_equal_shape([logits, links.seen, links.charge])
    return logits + snr[None] * links.seen - links.charge


def receive(features: Array, links: Links, expert: Array) -> Array:
    """The features of a batch as ONE expert receives them: `h + sqrt(P / SNR) n`.

    P is the mean square of an example's features, n standard normal: a sender of
    limited power. A perfect link gives the features bit by bit.

    Args:
      features: [B, ...] float.
      links: to all E experts.
      expert: [] int32, its number.
    """
    return receive_rows(features, links, expert, jnp.arange(len(features)))


def receive_rows(features: Array, links: Links, expert: Array, row: Array) -> Array:
    """As `receive`, of some examples: [n, ...].

    Args:
      features: [B, ...] float.
      links: to all E experts.
      expert: [] int32.
      row: [n] int32 in [0, B).
    """

    def send(row: Array) -> Array:
        sent = features[row].astype(jnp.float32)
        noise = jax.random.normal(
            jax.random.fold_in(links.key[row], expert), sent.shape
        )
        power = jnp.sqrt(jnp.square(sent).mean() + TINY)
        noisy = sent + power * jnp.sqrt(1 / links.snr[row, expert]) * noise
        return noisy.astype(features.dtype)

    return jax.vmap(send)(row)
