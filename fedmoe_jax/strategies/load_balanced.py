"""Load-balanced assignment: fitness less usage, under the client's capacity."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.align.desirability import desirability, normalise_fitness
from fedmoe_jax.align.explore import explore, uniform_scores
from fedmoe_jax.align.ties import top_k_by_lot
from fedmoe_jax.align.top_k import in_blocks, running_top_k
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Top k_c of the desirability, each client by itself, as the paper words it."""

    def decide(evidence: Evidence) -> Assignment:
        scores = desirability(evidence.fitness, evidence.usage, hyper)
        scores = explore(scores, evidence, hyper, key)
        rest = evidence.capacity, sizes.max_held, evidence.client
        return top_k_by_lot(scores, *rest, key)

    return in_blocks(decide, evidence)


def assign_running(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
) -> Assignment:
    """Top k_c of the desirability, one client after the other, in a random order.

    Usage grows by the load each pick can expect, so later clients avoid it. Explorers
    ignore usage, and what they pick is still counted. What an explorer would pick by
    decides the ties of the others.
    """
    drawn = uniform_scores(key, evidence.client, 2 + sizes.num_experts)
    place, explorer = drawn[:, 0], drawn[:, 1] < hyper.fitness.exploration
    gain = hyper.weights.fitness * normalise_fitness(evidence.fitness)
    return running_top_k(
        scores=jnp.where(explorer[:, None], drawn[:, 2:], gain),
        usage=evidence.usage,
        usage_weight=jnp.where(explorer, 0.0, hyper.weights.usage),
        load=evidence.load,
        capacity=evidence.capacity,
        order=jnp.argsort(place),
        lots=drawn[:, 2:],
        max_held=sizes.max_held,
        num_active=sizes.num_active,
    )


def leave_uncalibrated(config: ConfigDict) -> ConfigDict:
    """The gate learns from the task alone."""
    config.loss.calibration = 0.0
    return config


LOAD_BALANCED = Strategy(
    assign=assign,
    about=(
        "Gives each client the experts of highest desirability (fitness less usage), "
        "clients deciding independently."
    ),
)

LOAD_BALANCED_NO_CALIBRATION = LOAD_BALANCED._replace(
    about="As load_balanced, but without the calibration loss of the gate.",
    configure=leave_uncalibrated,
)

LOAD_BALANCED_RUNNING = Strategy(
    assign=assign_running,
    about=(
        "As load_balanced, but clients pick in a random order and each sees the load "
        "of earlier picks."
    ),
)
