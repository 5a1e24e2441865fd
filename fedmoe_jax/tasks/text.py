"""Text as windows of tokens, each of which is predicted from those before it."""

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fedmoe_jax.base import Data, Scores, Task
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array, PyTree


def check_tokens(data: Data) -> PyTree:
    """Nothing that `prepare` would read.

    Raises:
      UserError: there are no whole numbers `tokens` [X, P + 1] below the vocabulary, or
        no `length` [X] of them.
    """
    tokens = data.train.get("tokens", np.zeros(0))
    whole = np.issubdtype(tokens.dtype, np.integer) and tokens.ndim == 2
    if not whole or tokens.shape[1] < 2 or "length" not in data.train:
        raise UserError(
            f"the task text has train['tokens'] {tokens.dtype}{list(tokens.shape)} and "
            f"leaves {', '.join(data.train)}; allowed: whole numbers tokens[X, P + 1] "
            "and length[X]"
        )
    for part, rows in (("train", data.train), ("test", data.test)):
        low, high = rows["tokens"].min(), rows["tokens"].max()
        if data.vocabulary is None or low < 0 or high >= data.vocabulary:
            raise UserError(
                f"the task text has {part} tokens from {low} to {high}; allowed: 0 to "
                f"one less than the vocabulary={data.vocabulary}"
            )
    return {}


def count_vocabulary(data: Data) -> int:
    """The number of tokens, see `Data.vocabulary`."""
    check_tokens(data)
    assert data.vocabulary is not None
    return data.vocabulary


def prepare(rows: PyTree, statistics: PyTree) -> PyTree:
    """Inputs and targets of windows [B, P + 1].

    Returns:
      `tokens` and `target` [B, P] int32, each target the token after; `weight` [B, P]
      float32, 1 for targets within the window's `length`; where rows have the `bytes`
      [B, P + 1] of their tokens, `bytes` [B, P] float32 of the targets.
    """
    del statistics
    windows = rows["tokens"].astype(jnp.int32)
    place = jnp.arange(1, windows.shape[1])
    batch = {
        "tokens": windows[:, :-1],
        "target": windows[:, 1:],
        "weight": (place[None] < rows["length"][:, None]).astype(jnp.float32),
    }
    if "bytes" in rows:
        batch["bytes"] = rows["bytes"][:, 1:].astype(jnp.float32)
    return batch


def score_tokens(logits: Array, batch: PyTree) -> Scores:
    """Cross-entropy in nats and accuracy of every position [B, P]."""
    target = batch["target"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    right = (find_largest(logits) == target).astype(jnp.float32)
    return Scores(loss, right, batch["weight"], batch.get("bytes"))


def find_largest(logits: Array) -> Array:
    """`logits.argmax(-1)`, in two passes that CPUs vectorise, unlike the one of argmax.

    Where a logit is NaN it is none of the tokens.
    """
    logits = lax.stop_gradient(logits)
    token = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, token, logits.shape[-1]).min(axis=-1)


TEXT = Task(
    statistics=check_tokens,
    prepare=prepare,
    loss=score_tokens,
    num_outputs=count_vocabulary,
    bits=True,
)
