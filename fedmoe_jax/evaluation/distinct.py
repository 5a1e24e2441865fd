"""Equal rows of a bool array, found once each, inside a compiled program."""

from typing import NamedTuple

import jax.numpy as jnp

from fedmoe_jax.types import Array

WORD = 32  # bits


class Distinct(NamedTuple):
    """The distinct rows among n; their number is known only when the program runs.

    Attributes:
      first: [n] int32, a row of each kind, of the first `count`.
      count: [] int32.
      kind: [n] int32 in [0, count), of each row.
    """

    first: Array
    count: Array
    kind: Array


def keep_apart(count: int) -> Distinct:
    """So many rows as if no two of them were equal."""
    every = jnp.arange(count, dtype=jnp.int32)
    return Distinct(every, jnp.int32(count), every)


def find_distinct(rows: Array) -> Distinct:
    """The distinct ones of `rows` [n, ...] bool."""
    words = pack_bits(rows.reshape(len(rows), -1))
    _, first, kind = jnp.unique(
        words, axis=0, size=len(rows), return_index=True, return_inverse=True
    )
    return Distinct(first, kind.max() + 1, kind.reshape(-1))


def pack_bits(rows: Array) -> Array:
    """Rows [n, m] bool as [n, ceil(m / 32)] uint32, equal where the rows are."""
    padded = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % WORD)))
    bits = padded.reshape(len(rows), -1, WORD).astype(jnp.uint32)
    return (bits << jnp.arange(WORD, dtype=jnp.uint32)[None, None]).sum(
        axis=2, dtype=jnp.uint32
    )
