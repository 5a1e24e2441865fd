"""Scores of a model without parts: it is run once for each distinct held set.

Clients that hold the same experts have the same model, unless parts are personal or
gates have a bias; with a bias each client's set is one of its own. A set's model is run
for batches alone that have an example of a stratum of its clients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Routing
from fedmoe_jax.evaluation.distinct import find_distinct, keep_apart
from fedmoe_jax.evaluation.priors import Priors
from fedmoe_jax.evaluation.scoring import (
    ClientView,
    Examples,
    evaluation_route,
    is_wanted,
    keep_wanted,
    make_rows,
    score_prior,
    set_rows,
    share_gates,
    sum_scores,
    sum_strata,
    sum_values,
    wait_for_links,
)
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, PyTree


class HeldSets(NamedTuple):
    """The distinct sets of experts that clients hold.

    Attributes:
      held: [N, G, K] int32, the experts of the first `count` sets.
      slot: [N, G, K] bool, which of them count.
      count: [] int32.
      of_client: [N] int32, the set of each client.
      wanted: [N, L] float32, 1 for strata that a client of the set has, else 0.
      whole: [N] bool, clients that use all experts.
      bias: [N, G, K] float32, of their gate logits; None without one.
    """

    held: Array
    slot: Array
    count: Array
    of_client: Array
    wanted: Array
    whole: Array
    bias: Array | None = None


def find_sets(clients: ClientView, max_held: int) -> HeldSets:
    """The distinct sets of experts of clients [N] that have some in each layer.

    A client with more than `max_held` experts in a layer uses all of them. With a bias
    every client has a set of its own.
    """
    held, bias = clients.held, clients.bias
    whole = (held.sum(axis=2) > max_held).any(axis=1)
    first = (jnp.arange(held.shape[2]) == 0)[None, None]
    held = jnp.where(whole[:, None, None], first, held)
    distinct = find_distinct(held) if bias is None else keep_apart(len(held))
    kinds = held[distinct.first]
    order = jnp.argsort(~kinds, axis=2, stable=True)[..., :max_held]
    slot = jnp.take_along_axis(kinds, order, axis=2)
    if bias is not None:
        bias = jnp.take_along_axis(bias, order, axis=2)
    wanted = jnp.where(whole[:, None], 0.0, clients.wanted)
    wanted = jnp.zeros_like(wanted).at[distinct.kind].max(wanted)
    return HeldSets(order, slot, distinct.count, distinct.kind, wanted, whole, bias)


def run_model(
    params: PyTree,
    frozen: PyTree,
    held: Array,
    slot: Array,
    bias: Array | None,
    examples: Examples,
    program: Program,
) -> tuple[PyTree, Routing]:
    """Outputs [B, ...] and routing of the model with some experts.

    Args:
      params: the experts' leaves are [n, ...].
      frozen: see `Federation.frozen`.
      held: [G, n] int32, their numbers.
      slot: [G, n] bool, which of them may be used.
      bias: [G, n] float32, of their gate logits; None for none.
      examples: the batch.
      program: the model and the task.
    """
    route, slots = evaluation_route(program), (held, slot)
    route = route._replace(bias=bias, links=examples.links)
    return program.model.apply(params, frozen, examples.batch, *slots, route, None)


def run_all(
    params: PyTree, frozen: PyTree, examples: Examples, program: Program
) -> tuple[PyTree, Routing]:
    """Outputs [B, ...] and routing of the model with all experts, without a bias."""
    shape = program.sizes.num_layers, program.sizes.num_experts
    held = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    everything = held, jnp.ones(shape, bool)
    return run_model(params, frozen, *everything, None, examples, program)


def score_all(
    outputs: PyTree, routing: Routing, examples: Examples, program: Program
) -> dict[str, Array]:
    """Scores with all experts: `global` [V, L], their gate mass `routed` [G, E, L].

    With links also `delay` [1, L], the time of an answer by all layers, times weights.
    """
    scores = program.task.loss(outputs, examples.batch)
    sum_column = lambda gates: sum_strata(
        gates.reshape(scores.score.shape), scores, examples.stratum
    )
    over_experts = jax.vmap(sum_column, in_axes=1)
    counts = {
        "global": sum_values(scores, examples, program),
        "routed": jax.vmap(over_experts)(share_gates(routing.gates, program)),
    }
    if examples.links is not None:
        links, positions = examples.links, routing.gates.shape[1]
        time = jnp.repeat(links.time, positions // len(links.time), axis=0)
        wait = jax.vmap(wait_for_links, (0, None))
        delay = wait(routing.gates, links._replace(time=time)).sum(axis=0)
        counts["delay"] = sum_column(delay)[None]
    return counts


def score_sets(
    params: PyTree,
    frozen: PyTree,
    sets: HeldSets,
    priors: Priors | None,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """Rows of the distinct sets, each once, see `scoring.make_rows`.

    Rows of `personal` [N + 1, V, L] beyond their count are 0, and those of sets whose
    clients want none of the examples.
    """

    def run(number: Array, rows: dict[str, Array]) -> dict[str, Array]:
        every = sets.held, sets.slot, sets.bias
        held, slot, bias = jax.tree.map(lambda leaf: leaf[number], every)
        submodel = take_submodel(params, {}, held, program.strategy.local_experts)
        outputs, _ = run_model(submodel, frozen, held, slot, bias, examples, program)
        return set_rows(rows, number, outputs, priors, examples, program)

    def score(number: Array, rows: dict[str, Array]) -> dict[str, Array]:
        wanted, keep = is_wanted(examples, sets.wanted[number]), lambda _, rows: rows
        return jax.lax.cond(wanted, run, keep, number, rows)

    rows = make_rows(len(sets.of_client) + 1, priors, examples, program)
    return jax.lax.fori_loop(0, sets.count, score, rows)


def score_own(
    client: ClientView,
    log_share: Array | None,
    params: PyTree,
    frozen: PyTree,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """Scores of ONE client's own whole model: of all experts, and of the held ones.

    The latter are 0 where the client wants none of the examples, unless all is one.
    """
    held = jnp.broadcast_to(jnp.arange(client.held.shape[1]), client.held.shape)
    local = program.strategy.local_experts
    own = take_submodel(params, client.personal, held, local)
    everything = run_all(own, frozen, examples, program)

    def score(outputs: PyTree) -> dict[str, Array]:
        counts = {"personal": sum_scores(outputs, examples, program)}
        if log_share is not None:
            counts["prior"] = score_prior(outputs, log_share, examples, program)
        return counts

    def run() -> dict[str, Array]:
        slots = held, client.held, client.bias
        return score(run_model(own, frozen, *slots, examples, program)[0])

    if held.shape[1] == 1:
        counts = score(everything[0])
    else:
        counts = keep_wanted(run, examples, client.wanted)
    return counts | score_all(*everything, examples, program)


def score_model(
    params: PyTree,
    frozen: PyTree,
    clients: ClientView,
    sets: HeldSets | None,
    priors: Priors | None,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """The global and personal scores of one batch.

    Args:
      params: with the parts that the strategy has frozen.
      frozen: see `Federation.frozen`.
      clients: [N], read where parts are personal.
      sets: the distinct held sets, see `find_sets`; read where none are.
      priors: of the clients; None for none.
      examples: the batch.
      program: the static parts.

    Returns:
      See `evaluate.count_examples`; `personal` [N + 1, V, L] of the distinct sets and,
      in the last row, of all experts, or [N, V, L] of clients with personal parts.
    """
    if sets is None:
        own = lambda one: score_own(one[0], one[1], params, frozen, examples, program)
        return jax.lax.map(own, (clients, priors and priors.log_share))
    outputs, routing = run_all(params, frozen, examples, program)
    rows = score_sets(params, frozen, sets, priors, examples, program)
    last = len(sets.of_client)
    rows = set_rows(rows, last, outputs, priors, examples, program)
    return rows | score_all(outputs, routing, examples, program)
