"""Step 6 of a round: fitness and usage of ONE MoE layer learn from the feedback."""

import jax.numpy as jnp

from fedmoe_jax.align.drift_detector import (
    Detector,
    hasten,
    reset_fitness,
    residuals,
    watch,
)
from fedmoe_jax.align.fitness import PROBES, idle_rule, score, update_fitness
from fedmoe_jax.align.top_k import to_mask
from fedmoe_jax.align.usage import update_usage
from fedmoe_jax.types import AlignState, Array, Assignment, Feedback, Hyper, Static

RESET = 1200  # purpose, folded into the key of a round


def count_load(
    feedback: Feedback, arrived: Array, assignment: Assignment, num_experts: int
) -> Array:
    """[E] float32 examples trained through each expert by updates that arrived [C]."""
    counted = assignment.slot & arrived[:, None]
    load = jnp.where(counted, feedback.load, 0.0)
    return jnp.zeros(num_experts).at[assignment.held].add(load)


def find_counted(
    kind: str, feedback: Feedback, arrived: Array, assignment: Assignment
) -> Array:
    """[C, K] bool, the slots whose score is evidence.

    The client's update has arrived [C]. Scores from training need at least one position
    that was routed to the expert; a probe has run every received expert by itself, so
    that its loss is evidence of an expert that neither gate nor client has chosen, too.

    Args:
      kind: of the feedback, see `fitness.score`.
      feedback: of the cohort, leaves [C, K].
      arrived: [C] bool.
      assignment: the experts that clients have received, [C, K].
    """
    counted = assignment.slot & arrived[:, None]
    return counted if kind in PROBES else counted & (feedback.load > 0)


def notice(
    align: AlignState,
    cohort: Array,
    assignment: Assignment,
    score: Array,
    counted: Array,
    hyper: Hyper,
) -> tuple[Detector, Array]:
    """Looks for drift in the shortfall of scores [C, K] against the fitness.

    A pair whose fitness still comes from its prior rather than from scores says
    nothing, nor does a client that had an alarm a few rounds ago.

    Returns:
      The detector after the round, and alarm [N] bool.
    """
    numbers, detector = hyper.reaction, align.detector
    held = cohort[:, None], assignment.held
    seen = counted & jnp.isfinite(score)
    known = seen & (detector.evidence[held] >= numbers.evidence)
    evidence = detector.evidence.at[held].add(seen.astype(jnp.int32))
    detector = detector.replace(evidence=evidence)
    residual, observed = residuals(align.fitness[held], score, known)
    return watch(
        detector,
        cohort,
        residual,
        observed & (detector.haste_left[cohort] == 0),
        slack=numbers.slack,
        threshold=numbers.threshold,
        rounds=numbers.rounds,
    )


def learn(
    align: AlignState,
    cohort: Array,
    assignment: Assignment,
    trained: Assignment,
    feedback: Feedback,
    arrived: Array,
    received: Array,
    load: Array,
    key: Array,
    *,
    hyper: Hyper,
    static: Static,
) -> AlignState:
    """Step 6: fitness and usage of one layer learn from the round.

    Args:
      align: alignment state before the round.
      cohort: [C] int32 client ids.
      assignment: the experts that they were sent, [C, K]; fitness is of these, so that
        one that a client has received and not chosen is not idle, and keeps its score
        unless the feedback is a probe.
      trained: those of them that they held in training: all, unless clients choose.
      feedback: of the cohort, leaves [C, K].
      arrived: [C] bool, whether the client's update counts.
      received: [C] bool, whether the client has received its experts.
      load: [E] examples trained.
      key: a JAX key, consumed by scores that are reset.
      hyper: rates.
      static: gives `fitness.feedback`, `fitness.idle` and `reaction.kind`.
    """
    mask, kind = to_mask(trained, align.usage.shape[0]), static.fitness.feedback
    counted = find_counted(kind, feedback, arrived, assignment)
    value = score(kind, feedback, assignment.slot, hyper)
    detector, alarm, reaction = align.detector, None, static.reaction.kind
    rate, (decay, target) = hyper.fitness.rate, idle_rule(static.fitness.idle, hyper)
    if reaction != "none":
        detector, alarm = notice(align, cohort, assignment, value, counted, hyper)
    if reaction == "hasten":
        haste = jnp.where(detector.haste_left > 0, hyper.reaction.haste, 1.0)[:, None]
        rate, decay = hasten(rate, haste[cohort]), decay**haste
    fitness = update_fitness(
        *(align.fitness, cohort, assignment, value, counted),
        rate=rate,
        idle_decay=decay,
        idle_target=target,
    )
    if alarm is not None and reaction == "reset":
        numbers = hyper.fitness
        fitness = reset_fitness(key, fitness, alarm, numbers.prior, numbers.noise)
        forgotten = jnp.where(alarm[:, None], 0, detector.evidence)
        detector = detector.replace(evidence=forgotten)
    held = jnp.where(received[:, None], mask, align.held[cohort])
    return align.replace(
        fitness=fitness,
        detector=detector,
        usage=update_usage(align.usage, load, hyper.usage.decay),
        held=align.held.at[cohort].set(held),
        times_held=align.times_held.at[cohort].add(mask.astype(jnp.int32)),
    )
