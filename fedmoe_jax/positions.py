"""Means over the positions of a batch, each with its weight: padding counts nothing."""

import jax.numpy as jnp

from fedmoe_jax.base import Routing, Scores
from fedmoe_jax.types import Array


def average(values: Array, weight: Array | None) -> Array:
    """The mean of values [P, ...] over positions; 0 where no position has a weight.

    Args:
      values: float.
      weight: [P] float32 >= 0; None where every position counts alike.
    """
    if weight is None:
        return values.mean(axis=0)
    return jnp.tensordot(weight, values, 1) / jnp.maximum(weight.sum(), 1e-6)


def mean_loss(scores: Scores) -> Array:
    """[] nats, the mean over positions by their weights; leaves of any one shape."""
    if scores.weight is None:
        return scores.loss.mean()
    return (scores.loss * scores.weight).sum() / jnp.maximum(scores.weight.sum(), 1e-6)


def weigh_routing(routing: Routing, weight: Array | None) -> Routing:
    """The routing with the weights of its positions, see `Routing.weight`.

    Args:
      routing: of a batch; where layers are tied its logits have all positions once for
        each block.
      weight: float32, of all positions of the batch; None where all count alike.
    """
    if weight is None or routing.logits is None:
        return routing
    layers, positions = routing.logits.shape[:2]
    rows = jnp.tile(weight.reshape(-1), positions // weight.size)
    return routing._replace(weight=jnp.broadcast_to(rows[None], (layers, positions)))
