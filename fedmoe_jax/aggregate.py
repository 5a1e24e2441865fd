"""Masked per-expert aggregation, streamed, and the server's optimiser step.

Each part of the model is averaged over the clients that trained it:

    params_e <- params_e + server_step( sum_c w_ce delta_ce / sum_c w_ce )

Sums are accumulated chunk by chunk, so memory does not grow with the cohort. Parts
without a client keep their values and their optimiser moments.
"""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedmoe_jax.base import Strategy, Units
from fedmoe_jax.models.submodel import held_mask, is_local
from fedmoe_jax.moe_layers import (
    LAYERED,
    count_experts,
    layer_names,
    map_layers,
    map_rows,
)
from fedmoe_jax.optimizers import server_optimizer
from fedmoe_jax.privacy.sums import hide_sums
from fedmoe_jax.pruning.units import zero_keep
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Feedback,
    Hyper,
    PyTree,
    SimState,
    Static,
    make_keys,
)

MOST_EMPHASIS = 15 * math.log(10)  # of a factor's logarithm, see `emphasise`


class Sums(struct.PyTreeNode):
    """Running weighted sums of client deltas.

    Attributes:
      delta: like params, `sum_c w_c delta_c`.
      weight: of every part of params the sum of the weights: [] of stem and head,
        [G, E] of gate rows and experts.
      keep: of the parts that are pruned the sum of the weights of every entry, see
        `pruning.units.keep_params`; {} where nothing is.
    """

    delta: PyTree
    weight: dict[str, Array]
    keep: PyTree = struct.field(default_factory=dict)


def zero_sums(params: PyTree, units: tuple[Units, ...]) -> Sums:
    """Sums before any client; `units` are those that pruning can leave out."""
    rows = len(params["gate"]), count_experts(params["gate"])
    shape = lambda part: rows if part in LAYERED else ()
    return Sums(
        delta=jax.tree.map(jnp.zeros_like, params),
        weight={part: jnp.zeros(shape(part)) for part in params},
        keep=zero_keep(params, units),
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
        keep=jax.tree.map(jnp.add, sums.keep, stale.keep),
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
    """Experts by the client's examples, as far as they are routed there: [K].

    The share of its positions that was routed to the expert, times the examples that it
    owns: who owns few and takes as many steps as others does not weigh as much.
    """
    return size * feedback.routed


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
      `stem` and `head` [], `gate` [G, E], `experts` [G, K]; 0 for what does not
      count, such as an expert that was trained on no position: it is not sent. A
      broken update weighs like others: it travels, and is left out when it arrives.
    """
    num_layers = inputs.held.shape[0]
    num_experts = count_experts(update.delta["gate"])

    def weigh_layer(held: Array, slot: Array, feedback: Feedback) -> tuple:
        mask = held_mask(held, slot, num_experts)
        local = is_local(held, num_experts, strategy.local_experts)
        experts = strategy.expert_weight(slot, feedback, size, hyper)
        gate = strategy.gate_weight(mask, feedback, size, hyper)
        sent = slot & ~local & (feedback.load != 0)  # NaN of a broken update travels
        return gate, jnp.where(sent, experts, 0.0)

    gate, experts = map_layers(weigh_layer, num_layers, in_axes=0)(
        inputs.held, inputs.slot, update.feedback
    )
    whole = size.astype(jnp.float32)
    weights = {part: whole for part in update.delta}
    weights |= {"gate": gate, "experts": experts}
    for part in set(strategy.personal) - {"experts"}:
        weights[part] = jnp.zeros_like(weights[part])
    zero = lambda weight: jnp.where(inputs.steps > 0, weight, 0.0)
    return jax.tree.map(zero, weights)


def emphasise(weights: dict[str, Array], loss: Array, power: Array) -> dict[str, Array]:
    """The weights of ONE client times its loss to the power of q.

    After q-FFL (arXiv 1905.10497), whose objective `sum_c p_c F_c^(q + 1) / (q + 1)`
    has the gradient `sum_c p_c F_c^q grad F_c`. This project's choices: F_c, the loss
    of the params as received, is that of the client's first batch, which it computes
    anyway, with augmentation and dropout, instead of that of all its examples; and
    weights are normalised as they are without q, where q-FedAvg divides by an estimate
    of the curvature.

    Args:
      weights: of every part, see `weigh`.
      loss: F_c, [] float32; its power counts as no less than 1e-15 and no more than
        1e15, so that no client falls out and no sum overflows.
      power: q, [] >= 0.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    exponent = power * jnp.log(jnp.maximum(loss, tiny))
    factor = jnp.exp(jnp.clip(exponent, -MOST_EMPHASIS, MOST_EMPHASIS))
    return jax.tree.map(lambda weight: factor * weight, weights)


def accumulate(
    sums: Sums,
    which: Array | int,
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

    def add_tree(place: tuple, weight: Array, total: PyTree, delta: PyTree) -> PyTree:
        def add(total: Array, row: Array) -> Array:
            # Multiplying a NaN by a zero weight would still poison the sum.
            row = jnp.where(counted, row, 0.0)
            return total.at[place].add(scale_rows(weight, row))

        return jax.tree.map(add, total, delta)

    def add_part(part: str, totals: PyTree, rows: PyTree, scale: Any) -> PyTree:
        total, delta, weight = totals[part], rows[part], scale * weights[part]
        if part not in LAYERED:
            return add_tree((which,), weight, total, delta)
        place = inputs.held if part == "experts" else [slice(None)] * len(total)
        return {
            name: add_tree((which, place[g]), weight[g], total[name], delta[name])
            for g, name in enumerate(layer_names(total))
        }

    def add_weight(part: str, total: Array) -> Array:
        if part != "experts":
            return total.at[which].add(weights[part])
        layer = jnp.arange(len(inputs.held))[:, None]
        return total.at[which, layer, inputs.held].add(weights[part])

    own = sums.delta, update.delta, inputs.scale
    kept = sums.keep, update.keep, 1.0
    return Sums(
        delta={part: add_part(part, *own) for part in sums.delta},
        weight={part: add_weight(part, row) for part, row in sums.weight.items()},
        keep={part: add_part(part, *kept) for part in sums.keep},
    )


def locate_experts(row: Array, held: Array, num_experts: int) -> Array:
    """Where a chunk's experts belong in the sums: [R, E, c, K], 0 or 1.

    Args:
      row: [R, c], the sums that each client is added to.
      held: [c, K] int32, the experts that each client brings.
      num_experts: E.
    """
    expert = jax.nn.one_hot(held, num_experts, axis=1)  # [c, E, K]
    return jnp.einsum("rc,cek->reck", row, expert)


def add_clients(
    place: Array,
    scale: Array,
    weight: Array,
    total: tuple[PyTree, Array],
    rows: PyTree,
) -> tuple[PyTree, Array]:
    """Adds one part, or one layer of it, of a chunk of clients.

    Args:
      place: [R, c], or [R, E, c, K] of experts, see `locate_experts`.
      scale: [c], of each client's deltas.
      weight: [c] or [c, K].
      total: the sums, leaves [R, ...] or [R, E, ...], and the sum of the weights.
      rows: deltas, leaves [c, ...] or [c, K, ...].
    """
    product = functools.partial(jnp.tensordot, axes=weight.ndim, precision="highest")
    scaled = scale_rows(scale, weight)
    scaled = place * scaled.reshape((1,) * (place.ndim - weight.ndim) + weight.shape)
    add = lambda old, new: old + product(scaled, new)
    return jax.tree.map(add, total[0], rows), total[1] + product(place, weight)


def accumulate_chunk(
    sums: Sums,
    which: Array,
    inputs: ClientInput,
    updates: ClientUpdate,
    weights: dict[str, Array],
) -> Sums:
    """As `accumulate` for all c clients of a chunk at once, as products.

    On an accelerator one client after the other would be a loop of short steps, and a
    scatter that adds rows of several clients to one expert has no order on a GPU.

    Args:
      sums: leaves with a leading axis of R rows.
      which: [c] int32, the row that each client is added to.
      inputs: of the clients, with a leading axis c like all that follows.
      updates: their results.
      weights: of each part of their deltas, see `weigh`.
    """
    counted = jax.vmap(counts)(inputs, updates)
    # Multiplying a NaN by a zero weight would still poison the sum.
    keep = jax.vmap(lambda count, leaf: jnp.where(count, leaf, 0.0))
    own, kept = jax.tree.map(
        lambda leaf: keep(counted, leaf), (updates.delta, updates.keep)
    )
    num_sums, _, num_experts = sums.weight["gate"].shape
    row = jax.nn.one_hot(which, num_sums, axis=0)
    # Every client brings all rows of the gate, so that each has its place.
    add_gate = jax.vmap(add_clients, in_axes=(None, None, 1, 1, 1), out_axes=1)

    def add_layer(
        part: str, g: int, scale: Array, *layer: PyTree
    ) -> tuple[PyTree, Array]:
        if part == "gate":
            return add_gate(row, scale, *layer)
        place = locate_experts(row, inputs.held[:, g], num_experts)
        return add_clients(place, scale, *layer)

    def add_part(
        part: str, totals: PyTree, deltas: PyTree, scale: Array
    ) -> tuple[PyTree, Array]:
        total, amount = totals[part], sums.weight[part]
        rows, weight = deltas[part], weights[part]
        if part not in LAYERED:
            return add_clients(row, scale, weight, (total, amount), rows)
        trees, amounts = {}, []
        for g, name in enumerate(layer_names(total)):
            layer = weight[:, g], (total[name], amount[:, g]), rows[name]
            trees[name], more = add_layer(part, g, scale, *layer)
            amounts.append(more)
        return trees, jnp.stack(amounts, axis=1)

    whole, ones = sums.delta, jnp.ones_like(inputs.scale)
    parts = {part: add_part(part, whole, own, inputs.scale) for part in whole}
    return Sums(
        delta={part: trees for part, (trees, _) in parts.items()},
        weight={part: amount for part, (_, amount) in parts.items()},
        keep={part: add_part(part, sums.keep, kept, ones)[0] for part in sums.keep},
    )


def scale_rows(weight: Array, leaf: Array) -> Array:
    """`weight` [] or [n] times `leaf` [n, ...], row by row."""
    return weight.reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim)) * leaf


def mean_delta(sums: Sums) -> PyTree:
    """Weighted mean deltas, zero where no client contributed (never 0/0)."""

    def divide(weight: Array, total: Array) -> Array:
        inverse = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return scale_rows(inverse, total)

    mean = map_rows(divide, sums.weight, sums.delta)
    entries = lambda total, kept: total / jnp.where(kept > 0, kept, 1.0)
    pruned = {
        part: jax.tree.map(entries, sums.delta[part], kept)
        for part, kept in sums.keep.items()
    }
    return mean | pruned


def keep_pruned(new: PyTree, old: PyTree, keep: PyTree) -> PyTree:
    """Takes `old` where all clients have pruned, in params.

    Args:
      new: params.
      old: likewise.
      keep: see `Sums`.
    """
    choose = lambda kept, new, old: jnp.where(kept > 0, new, old)
    parts = {
        part: jax.tree.map(choose, kept, new[part], old[part])
        for part, kept in keep.items()
    }
    return new | parts


def keep_untrained(new: PyTree, old: PyTree, weight: dict[str, Array]) -> PyTree:
    """Takes `old` where no client has trained, in params and optimiser states alike.

    Args:
      new: params, or the state of `optimizers.server_optimizer`, step counts too.
      old: likewise.
      weight: of every part the sum of the weights, see `Sums`.
    """

    def choose(weight: Array, new_leaf: Array, old_leaf: Array) -> Array:
        trained = weight > 0
        shape = trained.shape + (1,) * (new_leaf.ndim - trained.ndim)
        return jnp.where(trained.reshape(shape), new_leaf, old_leaf)

    return map_rows(choose, weight, new, old)


def aggregate(
    state: SimState, sums: Sums, hyper: Hyper, static: Static
) -> tuple[PyTree, PyTree]:
    """Step 5 of a round: new params and server optimiser state, stale updates included.

    Args:
      state: before the round.
      sums: of the round.
      hyper: gives the server's learning rate, `late.discount` and the noise on sums.
      static: gives the server's optimiser, and whether there is noise.
    """
    if state.stale:
        sums = add_stale(sums, state.stale, hyper.late.discount)
    if static.privacy.noise:
        keys = make_keys(state.key, state.round)
        sums = sums.replace(delta=hide_sums(sums.delta, hyper, keys))
    tx = server_optimizer(static.server, hyper.server.learning_rate)
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
    new_params = keep_pruned(new_params, params, sums.keep)
    return (
        keep_untrained(new_params, params, sums.weight),
        keep_untrained(new_opt, opt_state, sums.weight),
    )
