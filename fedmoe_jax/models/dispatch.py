"""Computes only the (image, expert) pairs that are needed, grouped by expert.

The needed pairs of a batch are sorted by expert and every expert's group is padded to
blocks of `BLOCK_ROWS` rows. A loop with a traced trip count walks the blocks: each
takes one expert's params and its rows of features. The work follows the number of
needed pairs, not B * E, for any body of the experts.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.base import Links, Parts
from fedmoe_jax.models.links import receive_rows
from fedmoe_jax.types import Array, PyTree

BLOCK_ROWS = 64


class Blocks(NamedTuple):
    """The needed pairs as blocks of one expert each.

    Attributes:
      count: [] int32, blocks that hold a pair; they come first.
      expert: [n] int32 in [0, E) for the first `count` blocks.
      image: [n, rows] int32 in [0, B]; B marks rows that only pad a block.
      place: [B, E] int32 in [0, n * rows], the row of each pair; n * rows of others.
    """

    count: Array
    expert: Array
    image: Array
    place: Array


def plan_blocks(need: Array, rows: int, most: int) -> Blocks:
    """Groups the needed pairs by expert, images of one expert in their order.

    Args:
      need: [B, E] bool, the pairs to compute.
      rows: rows of one block.
      most: pairs of one image, at most E; it has the first of those that it needs.

    Returns:
      n = min(E * ceil(B / rows), floor(B * most / rows) + E) blocks.
    """
    chex.assert_rank(need, 2)
    num_images, num_experts = need.shape
    if most < num_experts:
        need = need & (need.cumsum(1) <= most)
    length = num_experts * -(-num_images // rows)
    length = min(length, num_images * most // rows + num_experts)
    blocks = -(-need.sum(0) // rows)  # [E]
    end = blocks.cumsum()
    # The place of each pair is known, so that nothing needs sorting: where the blocks
    # of its expert start, and its rank among that expert's images.
    place = (end - blocks)[None] * rows + need.cumsum(0) - 1
    place = jnp.where(need, place, length * rows)
    source = jnp.broadcast_to(jnp.arange(num_images)[:, None], need.shape)
    image = jnp.full(length * rows, num_images).at[place].set(source, mode="drop")
    expert = jnp.searchsorted(end, jnp.arange(length), side="right")
    return Blocks(end[-1], expert, image.reshape(length, rows), place)


def dispatch(
    parts: Parts,
    experts: PyTree,
    head: PyTree,
    features: Array,
    need: Array,
    shared: Array | None,
    links: Links | None = None,
) -> Array:
    """Every needed expert's own class logits.

    Args:
      parts: of the model.
      experts: params with a leading E axis.
      head: params.
      features: [B, ...] float.
      need: [B, E] bool.
      shared: [B, O] float, outputs of the shared expert, added to every expert's; None
        for none.
      links: over which the experts receive the features; None for perfect ones.

    Returns:
      [B, E, L] float32, zero where `need` is false.
    """
    blocks = plan_blocks(need, BLOCK_ROWS, need.shape[1])

    def answer(expert: Array, image: Array) -> Array:
        one = jax.tree.map(lambda leaf: leaf[expert], experts)
        if links is None:
            received = features.at[image].get(mode="clip")
        else:
            row = jnp.minimum(image, len(features) - 1)
            received = receive_rows(features, links, expert, row)
        outputs = parts.expert(one, received, None)
        if shared is not None:
            outputs = outputs + shared.at[image].get(mode="clip")
        return parts.head(head, outputs)

    def fill(block: Array, logits: Array) -> Array:
        expert, image = blocks.expert[block], blocks.image[block]
        return logits.at[image, expert].set(answer(expert, image), mode="drop")

    width = jax.eval_shape(answer, blocks.expert[0], blocks.image[0]).shape[-1]
    empty = jnp.zeros((*need.shape, width))
    return jax.lax.fori_loop(0, blocks.count, fill, empty)
