"""The losses of the gate, and the feedback on each held expert, summed over batches."""

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.models.routing import calibration_loss, load_loss, z_loss
from fedmoe_jax.types import Array, Feedback, Hyper, PyTree


def calibrate_gate(logits: Array, held: Array, factor: Array, hyper: Hyper) -> Array:
    """Calibration, load and z losses of gate logits, each with its weight.

    Args:
      logits: [P, E] float32.
      held: [E] bool.
      factor: [] of the calibration loss.
      hyper: gives the weights, `loss.calibration`, `loss.load` and `loss.z`.

    Returns:
      [] float32, nats.
    """
    weights = hyper.loss
    return (
        weights.calibration * factor * calibration_loss(logits, held)
        + weights.load * load_loss(logits, held)
        + weights.z * z_loss(logits, held)
    )


@struct.dataclass
class FeedbackSums:
    """Running sums over the examples that one client has trained on in a round.

    Attributes:
      gates: [K] float32, gate mass of every slot.
      right: [K] float32, gate mass on examples that were predicted right.
      loss: [K] float32 nats, gate-weighted cross-entropy.
      load: [K] float32, examples whose gates include the slot.
      peak: [K] float32, the largest gate of each batch, summed.
      report: the strategy's report on each batch, summed; None without one.
      batches: [] float32.
      total_loss: [] float32 nats.
      total_right: [] float32.
    """

    gates: Array
    right: Array
    loss: Array
    load: Array
    peak: Array
    report: PyTree
    batches: Array
    total_loss: Array
    total_right: Array


def zero_sums(max_held: int, report: PyTree) -> FeedbackSums:
    """Sums before any batch, for K slots and a report of such shapes."""
    slots, total = jnp.zeros(max_held), jnp.zeros(())
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), report)
    return FeedbackSums(slots, slots, slots, slots, slots, zeros, total, total, total)


def sum_batch(
    cross_entropy: Array, correct: Array, gates: Array, report: PyTree
) -> FeedbackSums:
    """The sums over one batch.

    Args:
      cross_entropy: [B] float, nats.
      correct: [B] float, 1 where the prediction is right.
      gates: [B, K] float.
      report: the strategy's, of this batch.
    """
    return FeedbackSums(
        gates=gates.sum(0),
        right=jnp.einsum("bk,b->k", gates, correct),
        loss=jnp.einsum("bk,b->k", gates, cross_entropy),
        load=(gates > 0).sum(0).astype(jnp.float32),
        peak=gates.max(0),
        report=report,
        batches=jnp.ones(()),
        total_loss=cross_entropy.sum(),
        total_right=correct.sum(),
    )


def summarise_feedback(sums: FeedbackSums) -> Feedback:
    """Per-slot feedback from the sums over a client's round.

    An example counts for an expert with its gate, so that with A = 1 `accuracy` is the
    accuracy on the examples routed to the expert, and experts that share every example
    can still differ.
    """
    share = 1.0 / jnp.maximum(sums.gates, 1e-6)
    return Feedback(
        accuracy=sums.right * share,
        loss=sums.loss * share,
        frequency=sums.gates / jnp.maximum(sums.gates.sum(), 1e-6),
        load=sums.load,
        peak=sums.peak / jnp.maximum(sums.batches, 1.0),
    )


def mean_report(sums: FeedbackSums) -> PyTree:
    """The strategy's report, mean over the batches; None without one."""
    batches = jnp.maximum(sums.batches, 1.0)
    return jax.tree.map(lambda leaf: leaf / batches, sums.report)
