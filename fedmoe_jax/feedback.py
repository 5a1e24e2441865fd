"""What a client's training says about the experts it holds, summed as it goes."""

import jax.numpy as jnp
from flax import struct

from fedmoe_jax.types import Array, Feedback


@struct.dataclass
class Seen:
    """Running sums over the examples that one client has trained on in a round.

    Attributes:
      gates: [K] float32, gate mass of every slot.
      right: [K] float32, gate mass on examples that were predicted right.
      loss: [K] float32 nats, gate-weighted cross-entropy.
      load: [K] float32, examples whose gates include the slot.
      total_loss: [] float32 nats.
      total_right: [] float32.
    """

    gates: Array
    right: Array
    loss: Array
    load: Array
    total_loss: Array
    total_right: Array


def nothing_seen(max_held: int) -> Seen:
    """Zero sums for K slots."""
    slots, total = jnp.zeros(max_held), jnp.zeros(())
    return Seen(slots, slots, slots, slots, total, total)


def see_batch(cross_entropy: Array, correct: Array, gates: Array) -> Seen:
    """What one batch adds, from cross-entropy [B], correct [B] and gates [B, K]."""
    return Seen(
        gates=gates.sum(0),
        right=jnp.einsum("bk,b->k", gates, correct),
        loss=jnp.einsum("bk,b->k", gates, cross_entropy),
        load=(gates > 0).sum(0).astype(jnp.float32),
        total_loss=cross_entropy.sum(),
        total_right=correct.sum(),
    )


def summarise_feedback(seen: Seen) -> Feedback:
    """Per-slot feedback from everything a client saw in a round.

    An example counts for an expert with its gate, so that with A = 1 `accuracy` is the
    accuracy on the examples routed to the expert, and experts that share every example
    can still differ.
    """
    share = 1.0 / jnp.maximum(seen.gates, 1e-6)
    return Feedback(
        accuracy=seen.right * share,
        loss=seen.loss * share,
        frequency=seen.gates / jnp.maximum(seen.gates.sum(), 1e-6),
        load=seen.load,
    )
