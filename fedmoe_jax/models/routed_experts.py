"""SwiGLU experts on the tokens that are routed to them alone, with their gradient.

The pairs of a token and an expert are grouped by expert in blocks, see `dispatch`. A
loop with a traced trip count walks the blocks, forward and backward, so that the work
follows the number of pairs: neither empty slots nor tokens routed elsewhere cost any.
On CPU; accelerators would wait for the loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedmoe_jax.models.dispatch import Blocks, plan_blocks
from fedmoe_jax.types import Array, PyTree

BLOCK_ROWS = 128  # tokens of a block, the fastest of 64, 128 and 256 on CPU


class Kept(NamedTuple):
    """The forward pass, as the backward pass reads it.

    Attributes:
      joined: `gate` and `up` of the experts, [K, D, 2 F].
      down: [K, F, D].
      tokens: [T, D].
      gates: [T, K].
      blocks: n of them.
      hidden: [n, rows, 2 F], products of the tokens with `joined`.
    """

    joined: Array
    down: Array
    tokens: Array
    gates: Array
    blocks: Blocks
    hidden: Array


class Block(NamedTuple):
    """The block of one step of the loop.

    Attributes:
      expert: [] int32.
      row: [rows] int32, its tokens; T marks rows that only pad it.
      place: the same within [0, T).
      gates: [rows, 1], of its tokens; 0 for padding.
    """

    expert: Array
    row: Array
    place: Array
    gates: Array


def take_block(number: Array, blocks: Blocks, gates: Array) -> Block:
    """A block by its number, with its gates from those of all tokens [T, K]."""
    expert, row = blocks.expert[number], blocks.image[number]
    place = jnp.minimum(row, len(gates) - 1)
    own = gates.at[place, expert].get(mode="promise_in_bounds")
    own = jnp.where(row < len(gates), own, 0.0)
    return Block(expert, row, place, own[:, None])


def take_rows(values: Array, block: Block) -> Array:
    """Rows [rows, D] of values [T, D] of all tokens."""
    return values.at[block.place].get(mode="promise_in_bounds")


def mix_forward(experts: PyTree, tokens: Array, gates: Array) -> tuple[Array, Kept]:
    """The outputs of `mix_routed`, and what its gradient needs."""
    rows = min(BLOCK_ROWS, len(tokens))
    blocks = plan_blocks(gates != 0, rows)  # a gate that is NaN is routed, too
    joined = jnp.concatenate([experts["gate"], experts["up"]], axis=2)

    def add_block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        mixed, hidden = carry
        block = take_block(number, blocks, gates)
        product = take_rows(tokens, block) @ joined[block.expert]
        gate, up = jnp.split(product, 2, axis=1)
        units = block.gates * jax.nn.silu(gate) * up
        outputs = units @ experts["down"][block.expert]
        mixed = mixed.at[block.row].add(outputs, mode="drop")
        return mixed, hidden.at[number].set(product)

    hidden = jnp.zeros((*blocks.image.shape, joined.shape[2]))
    start = jnp.zeros_like(tokens), hidden
    mixed, hidden = lax.fori_loop(0, blocks.count, add_block, start)
    return mixed, Kept(joined, experts["down"], tokens, gates, blocks, hidden)


def mix_backward(kept: Kept, gradient: Array) -> tuple[PyTree, Array, Array]:
    """Gradients of experts, tokens and gates; `gradient` [T, D] is that of outputs."""
    joined_back, down_back = (
        weights.swapaxes(1, 2) for weights in (kept.joined, kept.down)
    )

    def add_block(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        joined, down, tokens, gates = carry
        block = take_block(number, kept.blocks, kept.gates)
        outputs = take_rows(gradient, block)
        gate, up = jnp.split(kept.hidden[number], 2, axis=1)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        ungated = outputs @ down_back[block.expert]
        units = block.gates * ungated
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        product = jnp.concatenate([units * up * slope, units * silu], axis=1)
        inputs = take_rows(kept.tokens, block)
        return (
            joined.at[block.expert].add(inputs.T @ product),
            down.at[block.expert].add((block.gates * silu * up).T @ outputs),
            tokens.at[block.row].add(product @ joined_back[block.expert], mode="drop"),
            gates.at[block.row, block.expert].set(
                (ungated * silu * up).sum(axis=1), mode="drop"
            ),
        )

    start = tuple(
        jnp.zeros_like(leaf)
        for leaf in (kept.joined, kept.down, kept.tokens, kept.gates)
    )
    joined, *others = lax.fori_loop(0, kept.blocks.count, add_block, start)
    gate, up = jnp.split(joined, 2, axis=2)
    down, tokens, gates = others
    return {"gate": gate, "up": up, "down": down}, tokens, gates


@jax.custom_vjp
def mix_routed(experts: PyTree, tokens: Array, gates: Array) -> Array:
    """`sum_k gates[:, k] expert_k(tokens)`, computed where gates are not 0.

    A gate that is 0 gets no gradient, as its pair is not computed. Its logit would get
    none either way: `routing` makes it 0 whatever the logit is.

    Args:
      experts: leaves of `transformer_parts.feed_forward` with a leading axis of K.
      tokens: [T, D] float32.
      gates: [T, K] float32.

    Returns:
      [T, D].
    """
    return mix_forward(experts, tokens, gates)[0]


mix_routed.defvjp(mix_forward, mix_backward)
