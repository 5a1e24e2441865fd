"""How evenly a system serves its clients: all of them, and weak devices beside strong.

A device is as strong as it has memory, which no system changes: how many experts fit
into it depends on the size of the system's own.
"""

import jax.numpy as jnp

from fedmoe_jax.evaluation.panel import find_counted
from fedmoe_jax.evaluation.scoring import find_participants
from fedmoe_jax.floors import find_top_experts
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Federation, SimState


def rank(values: Array, counted: Array) -> Array:
    """The place of each value among those that count, equal ones in their middle.

    Args:
      values: [N] float32.
      counted: [N] bool.

    Returns:
      [N] float32 in (0, 1) where it counts, `(place - 1/2) / count` from 1 on.
    """
    ordered = jnp.sort(jnp.where(counted, values, jnp.inf))
    below, up_to = (  # by sorting: a search would be a loop
        jnp.searchsorted(ordered, values, side=s, method="sort")
        for s in ("left", "right")
    )
    return (below + up_to) / (2 * jnp.maximum(counted.sum(), 1))


def average(values: Array, counted: Array) -> Array:
    """[] float32, mean of the values [N] that count, NaN of none."""
    return jnp.where(counted, values, 0.0).sum() / counted.sum()


def correlate(left: Array, right: Array, counted: Array) -> Array:
    """Pearson's correlation of the values [N] that count, [] in [-1, 1].

    0 where one of both is the same for all.
    """
    apart = [
        jnp.where(counted, side - average(side, counted), 0.0) for side in (left, right)
    ]
    total = jnp.sqrt((apart[0] ** 2).sum() * (apart[1] ** 2).sum())
    product = (apart[0] * apart[1]).sum()
    return jnp.where(total > 0, product / jnp.where(total > 0, total, 1.0), 0.0)


def measure_spread(accuracy: Array, counted: Array) -> dict[str, Array]:
    """`accuracy_spread` [], the standard deviation of the clients' accuracies."""
    apart = accuracy - average(accuracy, counted)
    return {"accuracy_spread": jnp.sqrt(average(apart**2, counted))}


def measure_strength(
    accuracy: Array, memory: Array, counted: Array
) -> dict[str, Array]:
    """The accuracy of weak devices, alone, beside strong ones, and all along.

    Args:
      accuracy: [N] float32 in [0, 1].
      memory: [N] float32, bytes of each device.
      counted: [N] bool.

    Returns:
      `weakest_accuracy`, the mean over the third of the least memory, `capacity_gap`,
      that of the third of the most less it, NaN where all devices are equal; and
      `capacity_correlation`, Spearman's of memory and accuracy, all [].
    """
    place = rank(memory, counted)
    weak, strong = counted & (place < 1 / 3), counted & (place > 2 / 3)
    weakest = average(accuracy, weak)
    return {
        "weakest_accuracy": weakest,
        "capacity_gap": average(accuracy, strong) - weakest,
        "capacity_correlation": correlate(place, rank(accuracy, counted), counted),
    }


def measure_top(state: SimState, memory: Array, program: Program) -> dict[str, Array]:
    """`weakest_top_share` [] in [0, 1], of the weak third: those with a top expert.

    It is of what clients hold since they last took part, mean over layers; who never
    has holds none. {} where the server has no two experts to choose from.
    """
    strategy, sizes = program.strategy, program.sizes
    if sizes.num_experts - strategy.local_experts < 2 or strategy.gating == "sum":
        return {}
    top = find_top_experts(state.align, strategy.local_experts)
    has_top = (state.align.held & top[None]).any(axis=2).mean(axis=1)
    has_top = jnp.where(find_participants(state), has_top, 0.0)
    weak = rank(memory, jnp.ones_like(memory, bool)) < 1 / 3
    return {"weakest_top_share": average(has_top, weak)}


def measure_equity(
    state: SimState, federation: Federation, accuracy: Array, program: Program
) -> dict[str, Array]:
    """How evenly the clients are served, and take part; all numbers [].

    Args:
      state: the simulation.
      federation: gives the devices.
      accuracy: [N] float32, personal, NaN of clients that are not scored.
      program: the static parts.

    Returns:
      The numbers of `measure_spread`, and but for pooled data those of
      `measure_strength`, `measure_top` and `least_participation`, the share of the
      rounds in which the client that has counted least often has.
    """
    counted = find_counted(state, program) & jnp.isfinite(accuracy)
    found = measure_spread(accuracy, counted)
    if program.strategy.pooled:
        return found
    memory, rounds = federation.devices.memory, state.participation.rounds
    found |= measure_strength(accuracy, memory, counted)
    found |= measure_top(state, memory, program)
    return found | {"least_participation": rounds.min() / jnp.maximum(state.round, 1)}
