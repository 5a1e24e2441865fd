"""Step 6 of a round: the scores and the usage learn from what clients report."""

import jax.numpy as jnp

from fedmoe_jax.align.fitness import score, update_fitness
from fedmoe_jax.align.solve import to_mask
from fedmoe_jax.align.usage import update_usage
from fedmoe_jax.cohort import Report
from fedmoe_jax.types import AlignState, Array, Assignment, Hyper


def count_load(report: Report, assignment: Assignment, num_experts: int) -> Array:
    """[E] float32 examples trained through each expert by updates that count."""
    counted = assignment.slot & report.finite[:, None]
    load = jnp.where(counted, report.feedback.load, 0.0)
    return jnp.zeros(num_experts).at[assignment.held].add(load)


def learn(
    align: AlignState,
    cohort: Array,
    assignment: Assignment,
    report: Report,
    load: Array,
    hyper: Hyper,
    feedback: str,
) -> AlignState:
    """Step 6: scores and usage learn from the round.

    Args:
      align: alignment state before the round.
      cohort: [C] int32 client ids.
      assignment: what they held.
      report: what they reported.
      load: [E] examples trained.
      hyper: rates.
      feedback: which feedback feeds the fitness.
    """
    mask = to_mask(assignment, align.usage.shape[0])
    counted = assignment.slot & report.finite[:, None] & (report.feedback.load > 0)
    return align.replace(
        fitness=update_fitness(
            align.fitness,
            cohort,
            assignment,
            score(feedback, report.feedback, hyper),
            counted,
            hyper,
        ),
        usage=update_usage(align.usage, load, hyper.usage_decay),
        held=align.held.at[cohort].set(mask),
        times_held=align.times_held.at[cohort].add(mask.astype(jnp.int32)),
    )
