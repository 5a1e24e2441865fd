"""Scores of a model without parts: it is run once for each distinct held set.

Clients that hold the same experts have the same model, unless parts are personal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Routing, Scores
from fedmoe_jax.distinct import find_distinct
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.program import Program
from fedmoe_jax.scoring import (
    ClientView,
    Examples,
    evaluation_route,
    share_gates,
    sum_strata,
)
from fedmoe_jax.types import Array, PyTree


class HeldSets(NamedTuple):
    """The distinct sets of experts that clients hold.

    Attributes:
      held: [N, G, K] int32, the experts of the first `count` sets.
      slot: [N, G, K] bool, which of them count.
      count: [] int32.
      of_client: [N] int32, the set of each client.
      whole: [N] bool, clients that use all experts.
    """

    held: Array
    slot: Array
    count: Array
    of_client: Array
    whole: Array


def find_sets(held: Array, max_held: int) -> HeldSets:
    """The distinct rows of `held` [N, G, E] bool, which has a true entry in each.

    A client with more than `max_held` experts in a layer uses all of them.
    """
    whole = (held.sum(axis=2) > max_held).any(axis=1)
    first = (jnp.arange(held.shape[2]) == 0)[None, None]
    held = jnp.where(whole[:, None, None], first, held)
    distinct = find_distinct(held)
    kinds = held[distinct.first]
    order = jnp.argsort(~kinds, axis=2, stable=True)[..., :max_held]
    slot = jnp.take_along_axis(kinds, order, axis=2)
    return HeldSets(order, slot, distinct.count, distinct.kind, whole)


def run_model(
    params: PyTree,
    frozen: PyTree,
    held: Array,
    slot: Array,
    examples: Examples,
    program: Program,
) -> tuple[Scores, Routing]:
    """Scores [B, ...positions] and routing of the model with some experts.

    Args:
      params: the experts' leaves are [n, ...].
      frozen: see `Federation.frozen`.
      held: [G, n] int32, their numbers.
      slot: [G, n] bool, which of them may be used.
      examples: the batch.
      program: the model and the task.
    """
    route, slots = evaluation_route(program), (held, slot)
    outputs, routing = program.model.apply(
        params, frozen, examples.batch, *slots, route, None
    )
    return program.task.loss(outputs, examples.batch), routing


def score_all(
    params: PyTree, frozen: PyTree, examples: Examples, program: Program
) -> dict[str, Array]:
    """Scores with all experts: `global` [L], and their gate mass `routed` [G, E, L]."""
    shape = program.sizes.num_layers, program.sizes.num_experts
    held = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    everything = held, jnp.ones(shape, bool)
    scores, routing = run_model(params, frozen, *everything, examples, program)
    sum_column = lambda gates: sum_strata(
        gates.reshape(scores.score.shape), scores, examples.stratum
    )
    over_experts = jax.vmap(sum_column, in_axes=1)
    return {
        "global": sum_strata(scores.score, scores, examples.stratum),
        "routed": jax.vmap(over_experts)(share_gates(routing.gates, program)),
    }


def score_sets(
    params: PyTree,
    frozen: PyTree,
    sets: HeldSets,
    examples: Examples,
    program: Program,
) -> Array:
    """Scores [N, L] of the distinct sets, each once; rows beyond their count are 0."""

    def score(number: Array, rows: Array) -> Array:
        held, slot = sets.held[number], sets.slot[number]
        submodel = take_submodel(params, {}, held, program.strategy.local_experts)
        scores, _ = run_model(submodel, frozen, held, slot, examples, program)
        row = sum_strata(scores.score, scores, examples.stratum)
        return rows.at[number].set(row)

    rows = jnp.zeros((len(sets.of_client), examples.stratum.shape[1]))
    return jax.lax.fori_loop(0, sets.count, score, rows)


def score_own(
    client: ClientView,
    params: PyTree,
    frozen: PyTree,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """Scores of ONE client's own whole model: of all experts, and of the held ones."""
    held = jnp.broadcast_to(jnp.arange(client.held.shape[1]), client.held.shape)
    local = program.strategy.local_experts
    own = take_submodel(params, client.personal, held, local)
    scores, _ = run_model(own, frozen, held, client.held, examples, program)
    personal = sum_strata(scores.score, scores, examples.stratum)
    return {"personal": personal} | score_all(own, frozen, examples, program)


def score_model(
    params: PyTree,
    frozen: PyTree,
    clients: ClientView,
    sets: HeldSets | None,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """The global and personal scores of one batch.

    Args:
      params: with the parts that the strategy has frozen.
      frozen: see `Federation.frozen`.
      clients: [N], read where parts are personal.
      sets: the distinct held sets, see `find_sets`; read where none are.
      examples: the batch.
      program: the static parts.

    Returns:
      See `evaluate.count_examples`; `personal` [N + 1, L] of the distinct sets and, in
      the last row, of all experts, or [N, L] of clients with personal parts.
    """
    if sets is None:
        own = lambda client: score_own(client, params, frozen, examples, program)
        return jax.lax.map(own, clients)
    counts = score_all(params, frozen, examples, program)
    personal = score_sets(params, frozen, sets, examples, program)
    personal = jnp.concatenate([personal, counts["global"][None]])
    return counts | {"personal": personal}
