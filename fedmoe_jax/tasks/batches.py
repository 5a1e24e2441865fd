"""From rows of a data set to a batch as the model reads it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedmoe_jax.base import Task
from fedmoe_jax.types import Array, PyTree


def take_batch(
    rows: PyTree,
    ids: Array,
    statistics: PyTree,
    task: Task,
    drift: str = "",
    amount: Array | None = None,
    augment: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """The examples `ids` [B] as the model reads them, drifted where `amount` is given.

    Args:
      rows: leaves [X, ...], `train` or `test` of the federation.
      ids: [B] int32 in [0, X).
      statistics: see `Task.statistics`.
      task: prepares and drifts rows.
      drift: a name in `task.drifts`; read with `amount`.
      amount: [] float32, how far the rows have drifted; None for not.
      augment: changes drifted rows, at random; None for nothing.

    Returns:
      A pytree of leaves [B, ...].
    """
    taken = jax.tree.map(lambda leaf: leaf[ids], rows)
    if amount is not None:
        taken = dict(task.drifts)[drift](taken, amount)
    if augment is not None:
        taken = augment(taken)
    return task.prepare(taken, statistics)


class BatchShapes(NamedTuple):
    """Shapes and dtypes of batches, hashable.

    Attributes:
      leaves: of a batch of one row.
      tree: the structure that they are the leaves of.
    """

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    tree: Any  # a PyTreeDef, which is no type

    def of(self, batch_size: int) -> PyTree:
        """The shapes of a batch of `batch_size` rows."""
        size = lambda leaf: (batch_size, *leaf.shape[1:])
        return jax.tree.unflatten(
            self.tree,
            [jax.ShapeDtypeStruct(size(leaf), leaf.dtype) for leaf in self.leaves],
        )


def shape_batch(rows: PyTree, statistics: PyTree, task: Task) -> BatchShapes:
    """The shapes of batches of such rows [X, ...]; nothing is computed."""
    row = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
    batch = jax.eval_shape(task.prepare, jax.tree.map(row, rows), statistics)
    leaves, tree = jax.tree.flatten(batch)
    return BatchShapes(tuple(leaves), tree)
