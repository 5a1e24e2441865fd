"""From rows of a data set to a batch as the model reads it."""

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
) -> PyTree:
    """The examples `ids` [B] as the model reads them, drifted where rows drift.

    Args:
      rows: leaves [X, ...], `train` or `test` of the federation.
      ids: [B] int32 in [0, X).
      statistics: see `Task.statistics`.
      task: prepares and drifts rows.
      drift: a name in `task.drifts`, or "" for none.
      amount: [] float32, how far the rows have drifted; read with `drift`.

    Returns:
      A pytree of leaves [B, ...].
    """
    taken = jax.tree.map(lambda leaf: leaf[ids], rows)
    if drift:
        taken = dict(task.drifts)[drift](taken, amount)
    return task.prepare(taken, statistics)


def shape_batch(
    rows: PyTree, statistics: PyTree, task: Task, batch_size: int
) -> PyTree:
    """Shapes and dtypes of a batch of `batch_size` rows; nothing is computed."""
    row = lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype)
    return jax.eval_shape(task.prepare, jax.tree.map(row, rows), statistics)
