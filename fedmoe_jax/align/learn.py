"""Step 6 of a round: the scores and the usage learn from what clients report."""

import jax.numpy as jnp

from fedmoe_jax.align.drift_detector import (
    Detector,
    hasten,
    reset_fitness,
    residuals,
    watch,
)
from fedmoe_jax.align.fitness import score, update_fitness
from fedmoe_jax.align.top_k import to_mask
from fedmoe_jax.align.usage import update_usage
from fedmoe_jax.cohort import Report
from fedmoe_jax.rules import Rules
from fedmoe_jax.types import AlignState, Array, Assignment, Hyper
from fedmoe_jax.world.step import Keys

RESET = 1200  # purpose, folded into the key of a round


def count_load(report: Report, assignment: Assignment, num_experts: int) -> Array:
    """[E] float32 examples trained through each expert by updates that count."""
    counted = assignment.slot & report.arrived[:, None]
    load = jnp.where(counted, report.feedback.load, 0.0)
    return jnp.zeros(num_experts).at[assignment.held].add(load)


def notice(
    align: AlignState,
    cohort: Array,
    assignment: Assignment,
    score: Array,
    counted: Array,
    hyper: Hyper,
) -> tuple[Detector, Array]:
    """Looks for drift in how far scores [C, K] fall short of the fitness.

    A pair whose fitness still comes from its prior rather than from scores says
    nothing, nor does a client that had an alarm a few rounds ago.

    Returns:
      The detector after the round, and alarm [N] bool.
    """
    numbers, detector = hyper.world["reaction"], align.detector
    held = cohort[:, None], assignment.held
    seen = counted & jnp.isfinite(score)
    known = seen & (detector.evidence[held] >= numbers["evidence"])
    evidence = detector.evidence.at[held].add(seen.astype(jnp.int32))
    detector = detector.replace(evidence=evidence)
    residual, observed = residuals(align.fitness[held], score, known)
    return watch(
        detector,
        cohort,
        residual,
        observed & (detector.haste_left[cohort] == 0),
        slack=numbers["slack"],
        threshold=numbers["threshold"],
        rounds=numbers["rounds"],
    )


def hasten_clients(hyper: Hyper, hasty: Array, cohort: Array) -> Hyper:
    """Rates of each client's own: those who are hasty [N] bool learn several rounds.

    `fitness_rate` becomes [C, 1], `idle_decay` [N, 1].
    """
    haste = jnp.where(hasty, hyper.world["reaction"]["haste"], 1.0)[:, None]
    return hyper.replace(
        fitness_rate=hasten(hyper.fitness_rate, haste[cohort]),
        idle_decay=hyper.idle_decay**haste,
    )


def learn(
    align: AlignState,
    cohort: Array,
    assignment: Assignment,
    report: Report,
    load: Array,
    hyper: Hyper,
    rules: Rules,
    keys: Keys,
) -> AlignState:
    """Step 6: scores and usage learn from the round.

    Args:
      align: alignment state before the round.
      cohort: [C] int32 client ids.
      assignment: what they held.
      report: what they reported.
      load: [E] examples trained.
      hyper: rates.
      rules: which feedback feeds the fitness, and how to react to drift.
      keys: of the round, for scores that are reset.
    """
    mask = to_mask(assignment, align.usage.shape[0])
    counted = assignment.slot & report.arrived[:, None] & (report.feedback.load > 0)
    value = score(rules.feedback, report.feedback, hyper)
    detector, alarm, reaction = align.detector, None, rules.world.reaction
    if reaction:
        detector, alarm = notice(align, cohort, assignment, value, counted, hyper)
    if reaction == "hasten":
        hyper = hasten_clients(hyper, detector.haste_left > 0, cohort)
    fitness = update_fitness(align.fitness, cohort, assignment, value, counted, hyper)
    if reaction == "reset":
        fitness = reset_fitness(
            keys.of(RESET), fitness, alarm, hyper.prior, hyper.noise
        )
        forgotten = jnp.where(alarm[:, None], 0, detector.evidence)
        detector = detector.replace(evidence=forgotten)
    return align.replace(
        fitness=fitness,
        detector=detector,
        usage=update_usage(align.usage, load, hyper.usage_decay),
        held=align.held.at[cohort].set(mask),
        times_held=align.times_held.at[cohort].add(mask.astype(jnp.int32)),
    )
