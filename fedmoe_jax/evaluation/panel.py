"""The clients and the models that evaluation scores.

Clients that hold the same experts share a model, unless parts of it are personal or
their gates have a bias. So each distinct set of experts is scored once, exactly. Where
more models are possible than `evaluation.clients`, which is where each client has its
own or many sets are, at most so many clients are scored: those first in an order drawn
from the seed.

Label priors and what fine-tuning makes are every client's own: of any population at
most `evaluation.clients` are scored with them.

Every client counts where the server has a whole model, which serves the clients that
never got through, too. Where parts are personal these are left out.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.evaluation.distinct import find_distinct
from fedmoe_jax.evaluation.held_sets import HeldSets, find_sets
from fedmoe_jax.evaluation.priors import Priors, gather_priors
from fedmoe_jax.evaluation.scoring import (
    ClientView,
    Models,
    find_participants,
    view_clients,
)
from fedmoe_jax.groups import mix_classes
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Federation, SimState
from fedmoe_jax.world.step import View


class Panel(NamedTuple):
    """The n clients that are scored, N of them unless they are a sample.

    Attributes:
      client: [n] int32, their ids; None for all.
      counted: [n] bool, clients that count in the means.
      label_mix: [n, L] float32, rows sum to 1.
      drifts: [n] bool, whose images have drifted; None where none do.
      models: what is scored for them.
      model: [n] int32, each client's row of the scores of `models`.
      sets: the distinct held sets; None for a model with parts.
      priors: of the clients that are scored with them, too; None where the task has no
        place for a prior.
    """

    client: Array | None
    counted: Array
    label_mix: Array
    drifts: Array | None
    models: Models
    model: Array
    sets: HeldSets | None
    priors: Priors | None


def find_counted(state: SimState, program: Program) -> Array:
    """[N] bool, all clients; where parts are personal, those that have taken part."""
    took_part = find_participants(state)
    return took_part if program.strategy.personal else jnp.ones_like(took_part)


def count_possible_sets(program: Program) -> int:
    """Sets of at most K of E experts in every layer."""
    sizes = program.sizes
    choices = range(sizes.max_held + 1)
    each = sum(math.comb(sizes.num_experts, count) for count in choices)
    return each**sizes.num_layers


def has_own_models(program: Program) -> bool:
    """Whether no two clients share a model, whatever they hold."""
    strategy = program.strategy
    return bool(strategy.personal) or strategy.affinity is not None


def is_sampled(program: Program) -> bool:
    """Whether evaluation scores a sample of the clients."""
    most = program.static.evaluation.clients
    if not 0 < most < program.sizes.num_clients:
        return False
    return has_own_models(program) or count_possible_sets(program) > most


def draw_sample(order: Array, counted: Array, count: int) -> Array:
    """Ids [count] of the first clients of an order, those that count before others.

    Args:
      order: [N] int32, a permutation of all ids.
      counted: [N] bool, by id.
      count: n <= N.
    """
    first = counted[order]
    place = jnp.where(first, first.cumsum() - 1, first.sum() + (~first).cumsum() - 1)
    return jnp.zeros(count, order.dtype).at[place].set(order, mode="drop")


def choose_rows(
    federation: Federation, label_mix: Array, counted: Array, program: Program
) -> Array:
    """Rows [m] of the panel, at most `evaluation.clients`, whose own part is scored."""
    most, count = program.static.evaluation.clients, len(label_mix)
    if not 0 < most < count:
        return jnp.arange(count)
    counted = jnp.broadcast_to(counted, count)
    return draw_sample(federation.sample_order, counted, most)


def share_models(clients: ClientView, program: Program) -> tuple[Models, Array]:
    """The models of clients [n] without own ones, and which each of them has [n]."""
    distinct = find_distinct(clients.held)
    wanted = jnp.zeros_like(clients.wanted).at[distinct.kind].max(clients.wanted)
    view = ClientView({}, clients.held[distinct.first], wanted)
    return Models(view, distinct.count), distinct.kind


def keep_server(panel: Panel, num_groups: int, program: Program) -> Panel:
    """The panel for scores of whole models alone, summed by groups that are no strata.

    Args:
      panel: of any clients.
      num_groups: how many groups there are.
      program: whether each client's model is one of them.
    """
    view = panel.models.view
    if not program.strategy.personal:
        view = jax.tree.map(lambda leaf: leaf[:1], view)
    view = view._replace(wanted=jnp.zeros((len(view.held), num_groups)))
    none, sets = jnp.int32(0), panel.sets
    if sets is not None:
        wanted = jnp.zeros((1, num_groups))
        sets = sets._replace(count=none, of_client=sets.of_client[:1], wanted=wanted)
    return panel._replace(models=Models(view, none), sets=sets, priors=None)


def gather_panel(
    state: SimState, view: View, bias: Array | None, program: Program
) -> Panel:
    """Everything about clients that evaluation reads.

    Args:
      state: the simulation.
      view: of the world as it is now.
      bias: [N, G, E] float32, see `gate_bias`; None without one.
      program: the static parts.
    """
    federation, client = view.federation, None
    clients = view_clients(state, federation, bias)
    counted = find_counted(state, program)
    label_mix, drifts = federation.label_mix, None
    if view.distortion is not None:
        drifts = view.distortion > 0
    if is_sampled(program):
        most = program.static.evaluation.clients
        client = draw_sample(federation.sample_order, counted, most)
        every = clients, counted, label_mix, drifts
        chosen = jax.tree.map(lambda leaf: leaf[client], every)
        clients, counted, label_mix, drifts = chosen
    sets, count = None, len(counted)
    models, model = Models(clients, jnp.int32(count)), jnp.arange(count)
    if not program.strategy.personal and program.model.parts is None:
        sets = find_sets(clients, program.sizes.max_held)
        # The last row is that of all experts, see `held_sets.score_model`.
        model = jnp.where(sets.whole, count, sets.of_client)
    elif not has_own_models(program):
        models, model = share_models(clients, program)
    priors = None
    if program.task.add_prior is not None:
        row = choose_rows(federation, label_mix, counted, program)
        owner = jnp.broadcast_to(model, len(label_mix))  # of pooled data there is one
        classes = mix_classes(label_mix, program.sizes.num_groups)
        priors = gather_priors(classes, owner, row, count + 1)
    return Panel(client, counted, label_mix, drifts, models, model, sets, priors)
