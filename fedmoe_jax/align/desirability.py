"""Desirability: fitness of an expert for a client, less its usage (paper III-B-4)."""

import chex
import jax.numpy as jnp

from fedmoe_jax.align.usage import normalise_usage
from fedmoe_jax.types import Array, Hyper


def normalise_fitness(fitness: Array) -> Array:
    """Each client's fitness, min-max scaled over the experts.

    Without it the spread of a client's scores, not the weights, would set how
    strongly usage counts for that client.

    Args:
      fitness: [C, E] float32; entries that are not finite rank with the worst.

    Returns:
      [C, E] float32 in [0, 1]; a flat row becomes 0.
    """
    chex.assert_rank(fitness, 2)
    finite = jnp.isfinite(fitness)
    low = jnp.min(fitness, axis=1, keepdims=True, where=finite, initial=jnp.inf)
    high = jnp.max(fitness, axis=1, keepdims=True, where=finite, initial=-jnp.inf)
    span = high - low
    usable = finite & (span > 0) & jnp.isfinite(span)
    return jnp.where(usable, (fitness - low) / jnp.where(usable, span, 1), 0.0)


def desirability(fitness: Array, usage: Array, hyper: Hyper) -> Array:
    """`weights.fitness * normalised fitness - weights.usage * normalised usage`.

    The signs are the paper's (fitness positive, usage negative); the two
    normalisations are this project's choice, the paper leaves them open.

    Args:
      fitness: [C, E] float32.
      usage: [E] float32 >= 0.
      hyper: gives `weights.fitness` and `weights.usage`.

    Returns:
      [C, E] float32.
    """
    chex.assert_shape(usage, (fitness.shape[1],))
    gain = hyper.weights.fitness * normalise_fitness(fitness)
    return gain - hyper.weights.usage * normalise_usage(usage)[None]
