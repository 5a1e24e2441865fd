"""How well each expert suits each client, and the bias of the gates that it makes."""

import chex
import jax.numpy as jnp

from fedmoe_jax.align.desirability import normalise_fitness
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper


def by_fitness(evidence: Evidence, hyper: Hyper) -> Array:
    """The cohort's fitness, min-max scaled over the experts, [C, E] in [0, 1].

    A client whose fitness is the same for all experts has 0 for all.
    """
    return normalise_fitness(evidence.fitness)


def bias_experts(evidence: Evidence, hyper: Hyper, strategy: Strategy) -> Array:
    """`gate.bias` times the affinity: of the cohort's gate logits, [C, E] float32.

    Args:
      evidence: of ONE layer.
      hyper: gives `gate.bias`.
      strategy: of a program, with an `affinity`.
    """
    assert strategy.affinity is not None
    affinity = strategy.affinity(evidence, hyper)
    chex.assert_equal_shape([affinity, evidence.fitness])
    return hyper.gate.bias * affinity.astype(jnp.float32)


def bias_slots(
    assignment: Assignment, evidence: Evidence, hyper: Hyper, strategy: Strategy
) -> Assignment:
    """The assignment of ONE layer with the bias of the experts in its slots.

    It is as it was where the program has no bias, `affinity` None.
    """
    if strategy.affinity is None:
        return assignment
    bias = bias_experts(evidence, hyper, strategy)
    own = jnp.take_along_axis(bias, assignment.held, axis=1)
    return assignment.replace(bias=own)
