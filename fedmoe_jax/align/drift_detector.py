"""Detecting that what was learnt about a client no longer holds.

Rapid shifts of the data invalidate fitness scores (arXiv 2507.05685, the break
condition of fitness scoring). A one-sided CUSUM per client (Page, Continuous
Inspection Schemes, Biometrika 1954) watches how much worse experts do than their
scores promise. An alarm may reset the client's scores or make them learn faster.
"""

import chex
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.align.fitness import init_fitness
from fedmoe_jax.types import Array


class Detector(struct.PyTreeNode):
    """The detector's memory of every client.

    Attributes:
      suspicion: [N] float32 >= 0, the CUSUM.
      haste_left: [N] float32 >= 0, rounds for which scores still learn faster.
      alarms: [] float32, alarms so far.
      evidence: [N, E] int32, scores of every pair since its fitness was the prior.
    """

    suspicion: Array
    haste_left: Array
    alarms: Array
    evidence: Array


def init_detector(num_clients: int, num_experts: int) -> Detector:
    """A detector of N clients and E experts that has seen nothing."""
    return Detector(
        suspicion=jnp.zeros(num_clients),
        haste_left=jnp.zeros(num_clients),
        alarms=jnp.zeros(()),
        evidence=jnp.zeros((num_clients, num_experts), jnp.int32),
    )


def residuals(fitness: Array, score: Array, counted: Array) -> tuple[Array, Array]:
    """The fall of each client's experts below their fitness.

    Args:
      fitness: [C, K] float32, scores of the held pairs before the round.
      score: [C, K] float32, what the round says of them, may hold NaN.
      counted: [C, K] bool, slots whose score is evidence.

    Returns:
      residual [C] float32, mean of `fitness - score` over the slots with evidence, 0
      without any; observed [C] bool, whether there is any.
    """
    chex.assert_rank(fitness, 2)
    chex.assert_equal_shape([fitness, score, counted])
    valid = counted & jnp.isfinite(score)
    total = jnp.where(valid, fitness - score, 0.0).sum(axis=1)
    return total / jnp.maximum(valid.sum(axis=1), 1), valid.any(axis=1)


def watch(
    detector: Detector,
    client: Array,
    residual: Array,
    observed: Array,
    *,
    slack: Array,
    threshold: Array,
    rounds: Array,
) -> tuple[Detector, Array]:
    """One round of the CUSUM.

    The suspicion of an observed client becomes `max(0, suspicion + residual - slack)`,
    that of others stays. A suspicion above the threshold is an alarm; it starts again
    from 0, and the client's haste from `rounds`. The haste of others falls by 1.

    Args:
      detector: before the round.
      client: [C] int32, distinct client ids.
      residual: [C] float32, finite where `observed`.
      observed: [C] bool.
      slack: >= 0, mean residual that is tolerated.
      threshold: > 0. Residuals of d > slack from a suspicion of 0 are detected after
        the least number of rounds that exceeds `threshold / (d - slack)`.
      rounds: >= 0, rounds of haste after an alarm.

    Returns:
      the detector after the round, and alarm [N] bool.
    """
    chex.assert_rank([client, residual, observed], 1)
    chex.assert_equal_shape([client, residual, observed])
    old = detector.suspicion[client]
    new = jnp.where(observed, jnp.maximum(old + residual - slack, 0.0), old)
    suspicion = detector.suspicion.at[client].set(new)
    alarm = suspicion > threshold
    waited = jnp.maximum(detector.haste_left - 1, 0.0)
    after = Detector(
        suspicion=jnp.where(alarm, 0.0, suspicion),
        haste_left=jnp.where(alarm, rounds, waited),
        alarms=detector.alarms + alarm.sum(),
        evidence=detector.evidence,
    )
    return after, alarm


def reset_fitness(
    key: Array, fitness: Array, alarm: Array, prior: Array, noise: Array
) -> Array:
    """Scores [N, E] with the rows of alarmed clients as before any feedback.

    Args:
      key: a JAX key, consumed.
      fitness: [N, E] float32.
      alarm: [N] bool.
      prior: as in `init_fitness`.
      noise: as in `init_fitness`.
    """
    chex.assert_shape(alarm, (fitness.shape[0],))
    fresh = init_fitness(key, *fitness.shape, prior=prior, noise=noise)
    return jnp.where(alarm[:, None], fresh, fitness)


def hasten(rate: Array, haste: Array) -> Array:
    """The EMA rate that does in one round what `rate` does in `haste` equal rounds.

    Args:
      rate: in [0, 1], any shape.
      haste: > 0, the same shape or [].
    """
    return 1 - (1 - rate) ** haste
