"""FLEX-MoE (arXiv 2512.23070): most fitness under capacities and load bounds.

From the published description. Its linear program could not be read beyond "fitness,
capacity, lower and upper load bounds, historical deficits"; bounds as shares of the
mean load and the form and weight of the deficit are this project's choices.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.align.bounded import bounded_top_k, violation
from fedmoe_jax.align.prices import Bounds, sum_load
from fedmoe_jax.align.ties import draw_lots, raise_tied
from fedmoe_jax.align.top_k import fill_slots
from fedmoe_jax.base import Strategy
from fedmoe_jax.options import NON_NEGATIVE, SHARE, TRACED, Option, Range
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    PyTree,
    Sizes,
)

ROUNDING = 1e-4  # 1.2 * (5 / 3) is more than 2 in float32
LOT = 1e-4  # of a fitness in [0, 1]; its rounding is below 1e-7


def weigh_slots(evidence: Evidence) -> Array:
    """Every slot counts as one: [C] float32."""
    return jnp.ones(evidence.size.shape)


def weigh_examples(evidence: Evidence) -> Array:
    """A slot counts as the examples that its client owns: [C] float32."""
    return evidence.size.astype(jnp.float32)


def make_bounds(
    weight: Array, mean: Array, num_experts: int, hyper: Hyper, whole: bool
) -> Bounds:
    """Shares `low` and `high` of the mean load, for every expert alike."""
    low, high = hyper.flex_moe.low * mean, hyper.flex_moe.high * mean
    if whole:
        low, high = jnp.floor(low + ROUNDING), jnp.ceil(high - ROUNDING)
    every = jnp.ones(num_experts)
    return Bounds(weight=weight, low=low * every, high=high * every)


def assign(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array, *, weigh, whole: bool
) -> Assignment:
    """Most fitness in total, plus the experts' deficits so far, within the bounds.

    Experts of equal fitness for a client differ by lots, which no bound depends on.
    """
    weight = weigh(evidence)
    slots = fill_slots(evidence.capacity, sizes.max_held).sum(axis=1)
    mean = (weight * slots).sum() / sizes.num_experts
    fitness = jnp.where(jnp.isfinite(evidence.fitness), evidence.fitness, 0.0)
    lots = draw_lots(key, evidence.client, sizes.num_experts)
    fitness = raise_tied(fitness, lots, LOT)
    lacking = evidence.state["deficit"] / mean
    return bounded_top_k(
        fitness + hyper.flex_moe.deficit * lacking[None],
        evidence.capacity,
        make_bounds(weight, mean, sizes.num_experts, hyper, whole),
        max_held=sizes.max_held,
        whole=whole,
    )


def init(sizes: Sizes) -> PyTree:
    """No expert has a deficit before the first round."""
    return {
        "deficit": jnp.zeros(sizes.num_experts),
        "bound_violation": jnp.zeros(()),
    }


def update(
    evidence: Evidence,
    assignment: Assignment,
    feedback: Feedback,
    reports: PyTree,
    hyper: Hyper,
    *,
    weigh,
    whole: bool,
) -> PyTree:
    """`deficit <- max(0, deficit + mean - load)`, and how far bounds were missed."""
    deficit, weight = evidence.state["deficit"], weigh(evidence)
    load = sum_load(assignment, weight, deficit.shape[0])
    bounds = make_bounds(weight, load.mean(), deficit.shape[0], hyper, whole)
    return {
        "deficit": jnp.maximum(deficit + load.mean() - load, 0.0),
        "bound_violation": violation(load, bounds).sum(),
    }


def keep_fitness(config: ConfigDict) -> ConfigDict:
    """Unheld pairs keep their fitness: all that the assignment itself asks for."""
    config.fitness.idle = "keep"
    return config


def configure(config: ConfigDict) -> ConfigDict:
    """Gates stay with the clients; experts are averaged by the examples routed to them.

    Unheld pairs keep their fitness, and the loss is the cross-entropy alone.
    """
    config.gate.mode, config.merge.weight = "personal", "routed"
    config.loss.calibration = 0.0
    return keep_fitness(config)


OPTIONS = (
    Option(
        "flex_moe.low",
        SHARE,
        "least load of an expert, in mean loads",
        TRACED,
    ),
    Option(
        "flex_moe.high", Range(1), "largest load of an expert, in mean loads", TRACED
    ),
    Option(
        "flex_moe.deficit",
        NON_NEGATIVE,
        "weight of an expert's deficit so far, in mean loads",
        TRACED,
    ),
)


def make(
    weigh: Callable[[Evidence], Array], whole: bool, about: str, shared: str
) -> tuple[Strategy, Strategy]:
    """FLEX-MoE with loads counted by `weigh` (evidence -> [C]), and its assignment.

    `about` is of the system, `shared` of the one in which only the assignment differs.
    """
    system = Strategy(
        about=about,
        assign=functools.partial(assign, weigh=weigh, whole=whole),
        needs="personal gates",
        options=OPTIONS,
        configure=configure,
        init=init,
        update=functools.partial(update, weigh=weigh, whole=whole),
    )
    return system, system._replace(about=shared, needs="", configure=keep_fitness)


FLEX_MOE, FLEX_MOE_SHARED_GATE = make(
    weigh_slots,
    whole=True,
    about=(
        "Maximises total fitness with the number of every expert's holders between two "
        "bounds."
    ),
    shared="Assigns as flex_moe does, with gate, loss and weights of all systems.",
)

FLEX_MOE_EXAMPLES, FLEX_MOE_EXAMPLES_SHARED_GATE = make(
    weigh_examples,
    whole=False,
    about="As flex_moe, but bounds the examples that every expert's holders own.",
    shared=(
        "Assigns as flex_moe_examples does, with gate, loss and weights of all systems."
    ),
)
