"""Experts of a transformer: every held one on every token, or only on those routed.

    python -m benchmarks.dispatch

Forward and backward passes of ONE MoE layer, inside vmap over the clients of a chunk
(one, as on CPU) and a scan over local steps, for K held experts of which A are active.

* dense: all K experts on all tokens.
* ragged: the T * A pairs sorted by expert, and `jax.lax.ragged_dot`.
* blocks: the pairs in blocks of one expert each, dropless, and a loop over the blocks
  (`models.routed_experts.mix_routed`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import page
from benchmarks.start import time_interleaved
from fedmoe_jax.base import Route
from fedmoe_jax.models.routed_experts import BLOCK_ROWS, mix_routed
from fedmoe_jax.models.routing import route
from fedmoe_jax.models.transformer import run_experts, sees_routed
from fedmoe_jax.models.transformer_parts import init_feed_forward
from fedmoe_jax.runtime.xla import set_cpu_devices
from fedmoe_jax.types import Array, PyTree

# Width and hidden units of an expert -> numbers of tokens.
SIZES = {(64, 64): (512, 2048, 4096), (256, 1024): (512, 2048)}
HELD, ACTIVE = (1, 2, 4, 8), (1, 2)
STEPS, REPETITIONS = 2, 3


def run_dense(experts: PyTree, x: Array, gates: Array, active: int) -> Array:
    """The mixture [T, D] of all experts' outputs, leaves [K, ...], gates [T, K]."""
    return jnp.einsum("tk,tkd->td", gates, run_experts(experts, x, "cpu"))


def sort_pairs(gates: Array, active: int) -> tuple[Array, Array, Array]:
    """Gate and token of every pair [T * A], by expert, and pairs of each expert [K]."""
    weight, expert = jax.lax.top_k(gates, active)
    order = jnp.argsort(expert.ravel(), stable=True)
    size = jnp.zeros(gates.shape[1], jnp.int32).at[expert.ravel()].add(1)
    return weight.ravel()[order], order // active, size


def run_ragged(experts: PyTree, x: Array, gates: Array, active: int) -> Array:
    """As `run_dense`, by products of ragged groups of rows."""
    weight, token, size = sort_pairs(gates, active)
    product = lambda rows, name: jax.lax.ragged_dot(rows, experts[name], size)
    rows = x[token]
    hidden = jax.nn.silu(product(rows, "gate")) * product(rows, "up")
    outputs = weight[:, None] * product(hidden, "down")
    return jnp.zeros_like(x).at[token].add(outputs)


def run_blocks(experts: PyTree, x: Array, gates: Array, active: int) -> Array:
    """As `run_dense`, by products of blocks of rows, each with its expert's params."""
    return mix_routed(experts, x, gates, active)


FORMS = {"dense": run_dense, "ragged": run_ragged, "blocks": run_blocks}


def make_inputs(width: int, hidden: int, tokens: int, held: int) -> tuple:
    """Experts [1, K, ...], tokens [1, STEPS, T, D] and gate logits, of one client."""
    keys = jax.random.split(jax.random.key(0), held)
    make = lambda key: init_feed_forward(key, width, hidden)
    experts = jax.tree.map(lambda leaf: leaf[None], jax.vmap(make)(keys))
    shape = 1, STEPS, tokens
    x = jax.random.normal(jax.random.key(1), (*shape, width))
    return experts, x, jax.random.normal(jax.random.key(2), (*shape, held))


def build(form: Callable, active: int, *inputs: PyTree) -> Callable[[], PyTree]:
    """A compiled call of local steps in which every gradient is used."""

    def loss(experts: PyTree, x: Array, logits: Array) -> Array:
        gates = route(logits, jnp.ones(logits.shape[1], bool), active)
        return jnp.square(form(experts, x, gates, active)).mean()

    def train(experts: PyTree, x: Array, logits: Array) -> tuple[PyTree, PyTree]:
        def step(experts: PyTree, inputs: tuple) -> tuple[PyTree, PyTree]:
            grads, *others = jax.grad(loss, (0, 1, 2))(experts, *inputs)
            return jax.tree.map(lambda p, g: p - 0.1 * g, experts, grads), others

        return jax.lax.scan(step, experts, (x, logits))

    compiled = jax.jit(jax.vmap(train)).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def time_case(width: int, hidden: int, tokens: int, held: int, active: int) -> tuple:
    """A row of the table: the time of each form over that of the dense one."""
    inputs = make_inputs(width, hidden, tokens, held)
    calls = {name: build(form, active, *inputs) for name, form in FORMS.items()}
    time_interleaved(calls, 1)
    seconds = time_interleaved(calls, REPETITIONS)
    shortest = {name: min(values) for name, values in seconds.items()}
    ratios = [shortest[name] / shortest["dense"] for name in FORMS if name != "dense"]
    row = f"D = {width}, F = {hidden}", tokens, held, active, *ratios
    print(*row, flush=True)
    return row


def main() -> None:
    set_cpu_devices(1)
    rows = [
        time_case(*widths, tokens, held, active)
        for widths, counts in SIZES.items()
        for tokens in counts
        for held in HELD
        for active in ACTIVE
        if active <= held
    ]
    names = [name for name in FORMS if name != "dense"]
    routed = lambda tokens, held, active: sees_routed(
        Route(active), held, tokens, "cpu"
    )
    chosen = [row for row in rows if routed(*row[1:4])]
    others = [row for row in rows if row not in chosen]

    def show(some: list[tuple], place: int) -> str:
        ratios = [row[place] for row in some]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    body = "\n\n".join(
        [
            "Times of one MoE layer, forward and backward, over that of all K held "
            f"experts on all tokens. Blocks: **{show(chosen, 5)}** where transformers "
            f"use them, {show(others, 5)} elsewhere; ragged products "
            f"{show(chosen, 4)} and {show(others, 4)}.",
            page.table(("an expert", "tokens", "K", "A", *names), rows),
            f"Of the shortest of {REPETITIONS}, in turn. ragged is `lax.ragged_dot` on "
            f"tokens sorted by expert, blocks the same rows in blocks of {BLOCK_ROWS}.",
        ]
    )
    print(body)
    command = "python -m benchmarks.dispatch"
    page.write_section("dispatch", "Held experts of a transformer", command, body)


if __name__ == "__main__":
    main()
