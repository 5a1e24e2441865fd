"""SwiGLU experts on the tokens that are routed to them alone, with their gradient.

The pairs of a token and an expert are grouped by expert in blocks, see `dispatch`. A
loop with a traced trip count walks the blocks, forward and backward, so that the work
follows the number of pairs: neither empty slots nor tokens routed elsewhere cost any.
It writes whole blocks, from which each token then reads its own rows: adding rows one
by one takes XLA on CPU as long as some products. All of this, the comparison with
`jax.lax.ragged_dot` too, was timed on CPU alone (`benchmarks/dispatch.py`), where
transformers use it; on accelerators, where neither was timed, they run every held
expert on every token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedmoe_jax.models.dispatch import Blocks, plan_blocks
from fedmoe_jax.types import Array, PyTree

ANYWHERE = "promise_in_bounds"  # mode of indices that are within bounds
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
    own = gates.at[place, expert].get(mode=ANYWHERE)
    own = jnp.where(row < len(gates), own, 0.0)
    return Block(expert, row, place, own[:, None])


def take_rows(values: Array, place: Array) -> Array:
    """Rows [n, D] by their place [n] within values [m, D]."""
    return values.at[place].get(mode=ANYWHERE)


def add_rows(values: Array, place: Array, num_active: int) -> Array:
    """Sums over the rows of each token.

    Args:
      values: [m, D].
      place: [T, K] int32 of each token's rows, at most A of them; m for no row.
      num_active: A.

    Returns:
      [T, D].
    """
    total = jnp.zeros((len(place), values.shape[1]))
    for _ in range(num_active):
        row = place.min(axis=1)
        place = jnp.where(place == row[:, None], len(values), place)
        found = take_rows(values, jnp.minimum(row, len(values) - 1))
        total += jnp.where((row < len(values))[:, None], found, 0.0)
    return total


def mix_forward(
    experts: PyTree, tokens: Array, gates: Array, num_active: int
) -> tuple[Array, Kept]:
    """The outputs of `mix_routed`, and what its gradient needs."""
    rows, width = min(BLOCK_ROWS, len(tokens)), tokens.shape[1]
    active = min(num_active, gates.shape[1])
    blocks = plan_blocks(gates != 0, rows, active)  # a gate that is NaN is routed, too
    joined = jnp.concatenate([experts["gate"], experts["up"]], axis=2)

    def run_block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        outputs, hidden = carry
        block = take_block(number, blocks, gates)
        product = take_rows(tokens, block.place) @ joined[block.expert]
        gate, up = jnp.split(product, 2, axis=1)
        units = block.gates * jax.nn.silu(gate) * up
        outputs = outputs.at[number].set(units @ experts["down"][block.expert])
        return outputs, hidden.at[number].set(product)

    make = lambda size: jnp.zeros((*blocks.image.shape, size))
    start = make(width), make(joined.shape[2])
    outputs, hidden = lax.fori_loop(0, blocks.count, run_block, start)
    mixed = add_rows(outputs.reshape(-1, width), blocks.place, active)
    return mixed, Kept(joined, experts["down"], tokens, gates, blocks, hidden)


def mix_backward(
    num_active: int, kept: Kept, gradient: Array
) -> tuple[PyTree, Array, Array]:
    """Gradients of experts, tokens and gates; `gradient` [T, D] is that of outputs."""
    blocks, shape = kept.blocks, kept.blocks.image.shape
    joined_back, down_back = (
        weights.swapaxes(1, 2) for weights in (kept.joined, kept.down)
    )

    def run_block(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        joined, down, tokens, gates = carry
        block = take_block(number, blocks, kept.gates)
        outputs = take_rows(gradient, block.place)
        gate, up = jnp.split(kept.hidden[number], 2, axis=1)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        ungated = outputs @ down_back[block.expert]
        units = block.gates * ungated
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        product = jnp.concatenate([units * up * slope, units * silu], axis=1)
        inputs = take_rows(kept.tokens, block.place)
        return (
            joined.at[block.expert].add(inputs.T @ product),
            down.at[block.expert].add((block.gates * silu * up).T @ outputs),
            tokens.at[number].set(product @ joined_back[block.expert]),
            gates.at[number].set((ungated * silu * up).sum(axis=1)),
        )

    start = (
        *(jnp.zeros_like(leaf) for leaf in (kept.joined, kept.down)),
        jnp.zeros((*shape, gradient.shape[1])),
        jnp.zeros(shape),
    )
    joined, down, tokens, gates = lax.fori_loop(0, blocks.count, run_block, start)
    gate, up = jnp.split(joined, 2, axis=2)
    active = min(num_active, kept.gates.shape[1])
    tokens = add_rows(tokens.reshape(-1, gradient.shape[1]), blocks.place, active)
    gates = gates.reshape(-1).at[blocks.place].get(mode="fill", fill_value=0.0)
    return {"gate": gate, "up": up, "down": down}, tokens, gates


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mix_routed(experts: PyTree, tokens: Array, gates: Array, num_active: int) -> Array:
    """`sum_k gates[:, k] expert_k(tokens)`, computed where gates are not 0.

    A gate that is 0 gets no gradient, as its pair is not computed. Its logit would get
    none either way: `routing` makes it 0 whatever the logit is.

    Args:
      experts: leaves of `transformer_parts.feed_forward` with a leading axis of K.
      tokens: [T, D] float32.
      gates: [T, K] float32, at most A of a token not 0; of a token with more, which
        routing gives rows of NaN alone, the first A are computed.
      num_active: A.

    Returns:
      [T, D].
    """
    return mix_forward(experts, tokens, gates, num_active)[0]


mix_routed.defvjp(mix_forward, mix_backward)
