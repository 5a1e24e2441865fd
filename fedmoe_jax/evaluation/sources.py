"""The examples that one pass of evaluation scores, in batches shared out to devices."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.evaluation.scoring import Examples
from fedmoe_jax.program import Program
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import Array, Federation, Pool

TEST_BATCH = 500  # examples at once, at most
TEST_POSITIONS = 2048  # of the examples at once, unless one alone has more


class Source(NamedTuple):
    """The examples of one pass.

    Attributes:
      rows: leaves [X, ...] by name.
      example: [Q] int32 in [0, X).
      group: [Q] int32, 1 + the stratum, or else, by which scores are summed; 0 where an
        example only pads.
    """

    rows: dict[str, Array]
    example: Array
    group: Array


def take_test(federation: Federation) -> Source:
    """The test examples, by stratum and in its order.

    So most batches are of one stratum, and are left out for clients that lack it.
    """
    stratum = federation.test_stratum
    order = jnp.argsort(stratum, stable=True)
    return Source(federation.test, order, stratum[order] + 1)


def take_pool(federation: Federation, pool: Pool) -> Source:
    """Training examples that are set aside."""
    return Source(federation.train, pool.example, pool.group)


def choose_batch(program: Program) -> int:
    """The most examples of a batch in evaluation: 500 images, fewer windows of text.

    Memory follows the positions of a batch, not its examples.
    """
    positions = math.prod(program.scores.loss.shape[1:])
    return max(1, min(TEST_BATCH, TEST_POSITIONS // positions))


def divide_examples(count: int, most: int, num_devices: int) -> tuple[int, int]:
    """Batches of each device, examples in each; arguments as in `schedule_examples`."""
    batches = -(-count // (num_devices * most))
    return batches, -(-count // (num_devices * batches))


def schedule_examples(count: int, most: int, device: Array, num_devices: int) -> Array:
    """Positions among the examples of one device's batches, equally many on each.

    Args:
      count: Q, examples of the pass.
      most: the largest batch allowed.
      device: [] int32, this device among `num_devices`.
      num_devices: devices that share the examples.

    Returns:
      [batches, B] int32; positions from Q on are padding.
    """
    batches, size = divide_examples(count, most, num_devices)
    share = jnp.arange(batches * size).reshape(batches, size)
    return device * batches * size + share


def read_examples(
    source: Source,
    federation: Federation,
    position: Array,
    amount: Array | None,
    num_groups: int,
    program: Program,
) -> Examples:
    """The examples at `position` [B], drifted by `amount` [] where it is given."""
    count = source.group.shape[0]
    index = jnp.minimum(position, count - 1)
    rows = source.rows, source.example[index], federation.statistics
    drift = program.static.drift.images, amount
    group = jnp.where(position < count, source.group[index], 0)
    return Examples(
        batch=take_batch(*rows, program.task, *drift),
        stratum=jax.nn.one_hot(group - 1, num_groups),
        real=group > 0,
    )
