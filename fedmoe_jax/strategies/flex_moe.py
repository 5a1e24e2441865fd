"""FLEX-MoE (arXiv 2512.23070): most fitness under capacities and load bounds.

From the published description. Its linear program could not be read beyond "fitness,
capacity, lower and upper load bounds, historical deficits"; bounds as shares of the
mean load and the form and weight of the deficit are this project's choices.
"""

import functools

import jax.numpy as jnp

from fedmoe_jax.aggregate import by_routed, no_rows
from fedmoe_jax.align.bounded import bounded_top_k, violation
from fedmoe_jax.align.prices import Bounds, sum_load
from fedmoe_jax.align.top_k import fill_slots
from fedmoe_jax.options import NON_NEGATIVE, SHARE, Range
from fedmoe_jax.rules import Rules
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    PyTree,
    Sizes,
    Strategy,
)

ROUNDING = 1e-4  # 1.2 * (5 / 3) is more than 2 in float32


def weigh_slots(evidence: Evidence) -> Array:
    """Every slot counts as one: [C] float32."""
    return jnp.ones_like(evidence.load)


def weigh_examples(evidence: Evidence) -> Array:
    """A slot counts as the examples that its client trains: [C] float32."""
    return evidence.load


def make_bounds(
    weight: Array, mean: Array, num_experts: int, hyper: Hyper, whole: bool
) -> Bounds:
    """Shares `low` and `high` of the mean load, for every expert alike."""
    low, high = hyper.own["low"] * mean, hyper.own["high"] * mean
    if whole:
        low, high = jnp.floor(low + ROUNDING), jnp.ceil(high - ROUNDING)
    every = jnp.ones(num_experts)
    return Bounds(weight=weight, low=low * every, high=high * every)


def assign(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array, *, weigh, whole: bool
) -> Assignment:
    """Most fitness in total, and what experts have lacked so far, within the bounds."""
    weight = weigh(evidence)
    slots = fill_slots(evidence.capacity, sizes.max_held).sum(axis=1)
    mean = (weight * slots).sum() / sizes.num_experts
    fitness = jnp.where(jnp.isfinite(evidence.fitness), evidence.fitness, 0.0)
    lacked = evidence.memory["deficit"] / mean
    return bounded_top_k(
        fitness + hyper.own["deficit"] * lacked[None],
        evidence.capacity,
        make_bounds(weight, mean, sizes.num_experts, hyper, whole),
        max_held=sizes.max_held,
        whole=whole,
    )


def remember(sizes: Sizes) -> PyTree:
    """No expert has lacked anything before the first round."""
    return {
        "deficit": jnp.zeros(sizes.num_experts),
        "bound_violation": jnp.zeros(()),
    }


def learn(
    evidence: Evidence,
    assignment: Assignment,
    feedback: Feedback,
    hyper: Hyper,
    *,
    weigh,
    whole: bool,
) -> PyTree:
    """`deficit <- max(0, deficit + mean - load)`, and how far bounds were missed."""
    deficit, weight = evidence.memory["deficit"], weigh(evidence)
    load = sum_load(assignment, weight, deficit.shape[0])
    bounds = make_bounds(weight, load.mean(), deficit.shape[0], hyper, whole)
    return {
        "deficit": jnp.maximum(deficit + load.mean() - load, 0.0),
        "bound_violation": violation(load, bounds).sum(),
    }


def adapt(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """Gates stay with the clients; experts are averaged by what was routed to them."""
    return rules._replace(
        personal=("gate",), gate_weight=no_rows, expert_weight=by_routed
    )


def tune(hyper: Hyper) -> Hyper:
    """Unheld pairs keep their fitness; the loss is the cross-entropy alone."""
    return hyper.replace(idle_decay=1.0, calibration=0.0)


def make(weigh, whole: bool, note: str) -> Strategy:
    """FLEX-MoE with loads counted by `weigh` (evidence -> [C])."""
    return Strategy(
        assign=functools.partial(assign, weigh=weigh, whole=whole),
        note=note,
        reads=("fitness",),
        needs="personal gates",
        options="flex_moe",
        allowed=(
            ("flex_moe.low", SHARE),
            ("flex_moe.high", Range(1)),
            ("flex_moe.deficit", NON_NEGATIVE),
        ),
        adapt=adapt,
        tune=tune,
        remember=remember,
        learn=functools.partial(learn, weigh=weigh, whole=whole),
    )


FLEX_MOE = make(
    weigh_slots,
    whole=True,
    note=(
        "Maximises total fitness with the number of every expert's holders between two "
        "bounds."
    ),
)

FLEX_MOE_EXAMPLES = make(
    weigh_examples,
    whole=False,
    note="As flex_moe, but bounds the examples of every expert's holders.",
)
