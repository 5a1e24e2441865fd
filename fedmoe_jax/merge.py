"""Masked per-expert aggregation, streamed, and the server's optimiser step.

Each part of the model is averaged over the clients that trained it:

    params_e <- params_e + server_step( sum_c w_ce delta_ce / sum_c w_ce )

Sums are accumulated chunk by chunk, so memory does not grow with the cohort. What
nobody trained keeps its value and its optimiser moments.
"""

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedmoe_jax.align.solve import held_mask
from fedmoe_jax.client import ClientTask, ClientUpdate
from fedmoe_jax.types import Array, PyTree


@struct.dataclass
class Sums:
    """Running weighted sums of client deltas.

    Attributes:
      delta: like params, `sum_c w_c delta_c`.
      shared: [] sum of the weights of stem and head.
      gate: [E] sum of the weights of each gate row.
      experts: [E] sum of the weights of each expert.
    """

    delta: PyTree
    shared: Array
    gate: Array
    experts: Array


def zero_sums(params: PyTree) -> Sums:
    """Sums before any client."""
    num_experts = params["gate"]["bias"].shape[0]
    return Sums(
        delta=jax.tree.map(jnp.zeros_like, params),
        shared=jnp.zeros(()),
        gate=jnp.zeros((num_experts,)),
        experts=jnp.zeros((num_experts,)),
    )


def gate_weights(mode: str, weight: Array, task: ClientTask, num_experts: int) -> Array:
    """[E] weights with which ONE client's gate rows enter the average.

    Args:
      mode: `global` (all rows of every client), `holder_rows` (only rows of experts
        that the client held) or `personal` (none; the gate never leaves the client).
      weight: [] the client's weight.
      task: the client's task.
      num_experts: E.
    """
    held = held_mask(task.held, task.slot, num_experts).astype(jnp.float32)
    table = {
        "global": lambda: jnp.full((num_experts,), weight),
        "holder_rows": lambda: weight * held,
        "personal": lambda: jnp.zeros((num_experts,)),
    }
    return table[mode]()


def accumulate(
    sums: Sums,
    task: ClientTask,
    update: ClientUpdate,
    size: Array,
    *,
    gate_mode: str,
    weight: str,
) -> Sums:
    """Adds ONE client to the sums; a non-finite or padding client adds nothing.

    Args:
      sums: sums so far.
      task: what the client was sent.
      update: what it returned.
      size: [] examples the client owns.
      gate_mode: see `gate_weights`.
      weight: experts are weighted by the client's `examples`, or by the examples
        `routed` through each expert in the round.
    """
    counts = (task.steps > 0) & update.finite
    client_weight = jnp.where(counts, size.astype(jnp.float32), 0.0)
    by_slot = {"examples": client_weight, "routed": update.feedback.load}[weight]
    expert_weight = jnp.where(task.slot & counts, by_slot, 0.0)  # [K]
    row_weight = gate_weights(gate_mode, client_weight, task, sums.gate.shape[0])  # [E]
    # Multiplying a NaN by a zero weight would still poison the sum.
    delta = jax.tree.map(lambda leaf: jnp.where(counts, leaf, 0.0), update.delta)

    def add(total: PyTree, part: PyTree) -> PyTree:
        return jax.tree.map(lambda s, d: s + client_weight * d, total, part)

    return Sums(
        delta={
            "stem": add(sums.delta["stem"], delta["stem"]),
            "gate": jax.tree.map(
                lambda s, d: s + scale_rows(row_weight, d),
                sums.delta["gate"],
                delta["gate"],
            ),
            "experts": jax.tree.map(
                lambda s, d: s.at[task.held].add(scale_rows(expert_weight, d)),
                sums.delta["experts"],
                delta["experts"],
            ),
            "head": add(sums.delta["head"], delta["head"]),
        },
        shared=sums.shared + client_weight,
        gate=sums.gate + row_weight,
        experts=sums.experts.at[task.held].add(expert_weight),
    )


def scale_rows(weight: Array, leaf: Array) -> Array:
    """`weight` [n] times `leaf` [n, ...], row by row."""
    return weight.reshape(weight.shape + (1,) * (leaf.ndim - 1)) * leaf


def part_weights(sums: Sums) -> dict[str, Array]:
    """The summed weight of every part of the params: [] or, per row, [E]."""
    return {
        "stem": sums.shared,
        "gate": sums.gate,
        "experts": sums.experts,
        "head": sums.shared,
    }


def mean_delta(sums: Sums) -> PyTree:
    """Weighted mean deltas, zero where nobody contributed (never 0/0)."""

    def divide(total: Array, weight: Array) -> Array:
        inverse = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return scale_rows(inverse, total) if inverse.ndim else inverse * total

    weights = part_weights(sums)
    return {
        part: jax.tree.map(lambda leaf, w=weight: divide(leaf, w), sums.delta[part])
        for part, weight in weights.items()
    }


def server_optimizer(name: str, learning_rate: Array) -> optax.GradientTransformation:
    """The server's transformation of the mean delta, seen as a negative gradient."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate),
        "momentum": lambda: optax.sgd(learning_rate, momentum=0.9),
        "adam": lambda: optax.adam(learning_rate, b2=0.99, eps=1e-3),
        "yogi": lambda: optax.yogi(learning_rate, b2=0.99, eps=1e-3),
        "adagrad": lambda: optax.adagrad(learning_rate, eps=1e-3),
    }
    return table[name]()


def keep_untrained(new: PyTree, old: PyTree, sums: Sums) -> PyTree:
    """Takes `old` wherever nobody trained, in params and in optimiser states alike.

    Optimiser states mirror the params, so their leaves lie under the same part names;
    leaves under no part (step counts) always advance.
    """
    weights = part_weights(sums)

    def choose(path, new_leaf, old_leaf):
        parts = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        if not parts or parts[0] not in weights:
            return new_leaf
        trained = weights[parts[0]] > 0
        shape = trained.shape + (1,) * (new_leaf.ndim - trained.ndim)
        return jnp.where(trained.reshape(shape), new_leaf, old_leaf)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def merge(
    params: PyTree,
    opt_state: PyTree,
    sums: Sums,
    tx: optax.GradientTransformation,
) -> tuple[PyTree, PyTree]:
    """One server step on the mean delta.

    Returns:
      new params and optimiser state, shaped as before.
    """
    delta = mean_delta(sums)
    chex.assert_trees_all_equal_shapes(delta, params)
    grads = jax.tree.map(jnp.negative, delta)
    updates, new_opt = tx.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    return keep_untrained(new_params, params, sums), keep_untrained(
        new_opt, opt_state, sums
    )
