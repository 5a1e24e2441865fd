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
      peak: [K] float32, the largest gate of each batch, summed.
      mass: [E] or [0] float32, mean gate of each batch over all experts, summed.
      batches: [] float32.
      total_loss: [] float32 nats.
      total_right: [] float32.
    """

    gates: Array
    right: Array
    loss: Array
    load: Array
    peak: Array
    mass: Array
    batches: Array
    total_loss: Array
    total_right: Array


def nothing_seen(max_held: int, num_mass: int) -> Seen:
    """Zero sums for K slots, and for E experts if their mass is asked for (else 0)."""
    slots, total, mass = jnp.zeros(max_held), jnp.zeros(()), jnp.zeros(num_mass)
    return Seen(slots, slots, slots, slots, slots, mass, total, total, total)


def see_batch(cross_entropy: Array, correct: Array, gates: Array, mass: Array) -> Seen:
    """What one batch adds.

    Args:
      cross_entropy: [B] float, nats.
      correct: [B] float, 1 where the prediction is right.
      gates: [B, K] float.
      mass: [E] or [0] float, mean gate over all experts.
    """
    return Seen(
        gates=gates.sum(0),
        right=jnp.einsum("bk,b->k", gates, correct),
        loss=jnp.einsum("bk,b->k", gates, cross_entropy),
        load=(gates > 0).sum(0).astype(jnp.float32),
        peak=gates.max(0),
        mass=mass,
        batches=jnp.ones(()),
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
        peak=seen.peak / jnp.maximum(seen.batches, 1.0),
        mass=seen.mass / jnp.maximum(seen.batches, 1.0),
    )
