"""Masked per-expert aggregation, streamed, and the server's optimiser step.

Each part of the model is averaged over the clients that trained it:

    params_e <- params_e + server_step( sum_c w_ce delta_ce / sum_c w_ce )

Sums are accumulated chunk by chunk, so memory does not grow with the cohort. Parts
without a client keep their values and their optimiser moments.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedmoe_jax.base import PARTS, Strategy
from fedmoe_jax.models.submodel import held_mask, is_local
from fedmoe_jax.optimizers import server_optimizer
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Feedback,
    Hyper,
    PyTree,
    SimState,
    Static,
)


@struct.dataclass
class Sums:
    """Running weighted sums of client deltas.

    Attributes:
      delta: like params, `sum_c w_c delta_c`.
      weight: of every part of params the sum of the weights: [] of stem and head, [E]
        of gate rows and experts.
    """

    delta: PyTree
    weight: dict[str, Array]


def zero_sums(params: PyTree) -> Sums:
    """Sums before any client."""
    num_experts = params["gate"]["bias"].shape[0]
    shapes = {"stem": (), "gate": (num_experts,), "experts": (num_experts,), "head": ()}
    return Sums(
        delta=jax.tree.map(jnp.zeros_like, params),
        weight={part: jnp.zeros(shape) for part, shape in shapes.items()},
    )


def add_stale(sums: Sums, stale: Sums, discount: Array) -> Sums:
    """Sums with those of updates that came too late for their own round.

    Args:
      sums: of this round.
      stale: of the round before.
      discount: [] in [0, 1], factor of a stale delta. Its weight stays whole, so that
        it is discounted also where no other client has trained.
    """
    add = lambda now, old: now + discount * old
    return Sums(
        delta=jax.tree.map(add, sums.delta, stale.delta),
        weight=jax.tree.map(jnp.add, sums.weight, stale.weight),
    )


def all_rows(held: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """All gate rows of every client, by its examples: [E]."""
    return jnp.full(held.shape, size.astype(jnp.float32))


def held_rows(held: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """Only the gate rows of experts that the client held, by its examples: [E]."""
    return jnp.where(held, size.astype(jnp.float32), 0.0)


def no_rows(held: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """None: the gate never leaves the client. [E]."""
    return jnp.zeros(held.shape)


def by_examples(slot: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """Experts by the examples that the client owns: [K]."""
    return jnp.full(slot.shape, size.astype(jnp.float32))


def by_routed(slot: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """Experts by the examples that were routed through them in the round: [K]."""
    return feedback.load


GATE_WEIGHTS = {"global": all_rows, "holder_rows": held_rows, "personal": no_rows}
EXPERT_WEIGHTS = {"examples": by_examples, "routed": by_routed}


def counts(inputs: ClientInput, update: ClientUpdate) -> Array:
    """[] bool, whether ONE client is in the averages: finite, and no mere padding."""
    return (inputs.steps > 0) & update.finite


def weigh(
    inputs: ClientInput,
    update: ClientUpdate,
    size: Array,
    hyper: Hyper,
    strategy: Strategy,
) -> dict[str, Array]:
    """The weights of ONE client in the average of every part of the params.

    Args:
      inputs: of the client.
      update: its result.
      size: [] examples the client owns.
      hyper: hyperparameters.
      strategy: weights of rows and experts, and the parts that stay with the client.

    Returns:
      `stem` and `head` [], `gate` [E], `experts` [K]; 0 for what does not count. A
      broken update weighs like others: it travels, and is left out when it arrives.
    """
    num_experts = update.delta["gate"]["bias"].shape[0]
    held = held_mask(inputs.held, inputs.slot, num_experts)
    local = is_local(inputs.held, num_experts, strategy.local_experts)
    reported = update.feedback, size, hyper
    expert_weight = strategy.expert_weight(inputs.slot, *reported)
    weights = {
        "stem": size.astype(jnp.float32),
        "gate": strategy.gate_weight(held, *reported),
        "experts": jnp.where(inputs.slot & ~local, expert_weight, 0.0),
        "head": size.astype(jnp.float32),
    }
    for part in set(strategy.personal) - {"experts"}:
        weights[part] = jnp.zeros_like(weights[part])
    zero = lambda weight: jnp.where(inputs.steps > 0, weight, 0.0)
    return jax.tree.map(zero, weights)


def accumulate(
    sums: Sums,
    which: Array,
    inputs: ClientInput,
    update: ClientUpdate,
    weights: dict[str, Array],
) -> Sums:
    """Adds ONE client to one of several sums.

    Args:
      sums: leaves with a leading axis, one row for each of the sums.
      which: [] int32, the row that the client is added to.
      inputs: of the client.
      update: its result.
      weights: of each part of its delta, see `weigh`.
    """
    counted = counts(inputs, update)

    def add(part: str, total: Array, row: Array) -> Array:
        place = (which, inputs.held) if part == "experts" else which
        return total.at[place].add(row)

    def add_delta(part: str, total: Array, delta: Array) -> Array:
        # Multiplying a NaN by a zero weight would still poison the sum.
        delta = jnp.where(counted, delta, 0.0)
        return add(part, total, scale_rows(inputs.scale * weights[part], delta))

    def add_part(part: str) -> PyTree:
        add_leaf = functools.partial(add_delta, part)
        return jax.tree.map(add_leaf, sums.delta[part], update.delta[part])

    return Sums(
        delta={part: add_part(part) for part in PARTS},
        weight={part: add(part, sums.weight[part], weights[part]) for part in PARTS},
    )


def scale_rows(weight: Array, leaf: Array) -> Array:
    """`weight` [] or [n] times `leaf` [n, ...], row by row."""
    return weight.reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim)) * leaf


def mean_delta(sums: Sums) -> PyTree:
    """Weighted mean deltas, zero where no client contributed (never 0/0)."""

    def divide(total: Array, weight: Array) -> Array:
        inverse = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return scale_rows(inverse, total)

    return {
        part: jax.tree.map(lambda leaf, w=weight: divide(leaf, w), sums.delta[part])
        for part, weight in sums.weight.items()
    }


def keep_untrained(new: PyTree, old: PyTree, sums: Sums) -> PyTree:
    """Takes `old` where no client has trained, in params and in optimiser states alike.

    Optimiser states mirror the params, so their leaves lie under the same part names;
    leaves under no part (step counts) always advance.
    """
    weights = sums.weight

    def choose(path, new_leaf, old_leaf):
        parts = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        if not parts or parts[0] not in weights:
            return new_leaf
        trained = weights[parts[0]] > 0
        shape = trained.shape + (1,) * (new_leaf.ndim - trained.ndim)
        return jnp.where(trained.reshape(shape), new_leaf, old_leaf)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def aggregate(
    state: SimState, sums: Sums, hyper: Hyper, static: Static
) -> tuple[PyTree, PyTree]:
    """Step 5 of a round: new params and server optimiser state, stale updates included.

    Args:
      state: before the round.
      sums: of the round.
      hyper: gives the server's learning rate and `late.discount`.
      static: gives the server's optimiser.
    """
    if state.stale:
        sums = add_stale(sums, state.stale, hyper.late.discount)
    tx = server_optimizer(static.server.optimizer, hyper.server.learning_rate)
    return merge(state.params, state.server_opt, sums, tx)


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
