"""Clients that never take part, served as newcomers by a strategy that welcomes them.

A newcomer sends what the strategy asks of it, made of every other of its examples, and
gets experts of the server's for it; its accuracy is over the rest of its examples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.evaluation.held_sets import find_sets
from fedmoe_jax.evaluation.panel import Panel, keep_server
from fedmoe_jax.evaluation.scoring import ClientView, Models
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Federation, Hyper, Pool, SimState


class Asked(NamedTuple):
    """The examples that newcomers are asked about, those of each side by side.

    Attributes:
      example: [Q] int32, the examples.
      start: [U] int32, the first one of each client.
      size: [U] int32, how many there are of each.
    """

    example: Array
    start: Array
    size: Array


def rank_examples(group: Array, num_groups: int) -> Array:
    """The place of each example [Q] among those of its group [Q] in [0, num_groups)."""
    order = jnp.argsort(group, stable=True)
    count = jnp.zeros(num_groups, jnp.int32).at[group].add(1)
    first = count.cumsum() - count
    place = jnp.arange(len(group)) - first[group[order]]
    return jnp.zeros_like(group).at[order].set(place)


def divide_pool(pool: Pool, num_clients: int) -> tuple[Asked, Pool]:
    """What newcomers are asked about, and the examples that are left for the test.

    Args:
      pool: of all newcomers, grouped by client.
      num_clients: U.
    """
    asked = rank_examples(pool.group, num_clients + 1) % 2 == 0
    asked &= pool.group > 0
    client = jnp.where(asked, pool.group - 1, num_clients)
    size = jnp.zeros(num_clients + 1, jnp.int32).at[client].add(1)
    example = pool.example[jnp.argsort(client, stable=True)]
    start = size.cumsum() - size
    tested = pool.replace(group=jnp.where(asked, 0, pool.group))
    return Asked(example, start[:-1], size[:-1]), tested


def welcome_all(
    state: SimState,
    federation: Federation,
    asked: Asked,
    hyper: Hyper,
    program: Program,
) -> Array:
    """The experts of every newcomer, [U, G, E] bool."""
    welcome = program.strategy.welcome
    assert welcome is not None
    static = dict(model=program.model, task=program.task, sizes=program.sizes)

    def serve(own: tuple[Array, Array]) -> Array:
        start, size = own
        index = jnp.roll(asked.example, -start)
        return welcome(state, federation, index, size, hyper, **static)

    return jax.lax.map(serve, (asked.start, asked.size))


def gather_newcomers(panel: Panel, held: Array, program: Program) -> Panel:
    """The panel of newcomers that hold `held` [U, G, E] bool, scored by client."""
    num_clients = len(held)
    panel = keep_server(panel, num_clients, program)
    view = ClientView({}, held, jnp.eye(num_clients))
    model, sets = jnp.arange(num_clients), None
    if program.model.parts is None:
        sets = find_sets(view, program.sizes.max_held)
        # The last row is that of all experts, see `held_sets.score_model`.
        model = jnp.where(sets.whole, num_clients, sets.of_client)
    models = Models(view, jnp.int32(num_clients))
    return panel._replace(models=models, model=model, sets=sets)


def take_own(counts: dict[str, Array], panel: Panel) -> dict[str, Array]:
    """Weights `total` [U] and each newcomer's own scores, as `global` [V, U]."""
    client = jnp.arange(len(panel.model))
    own = counts["personal"][panel.model, :, client]
    return {"total": counts["total"], "global": own.T}
