"""Assignment by the channel: alone, or jointly with the data.

Every client solves a knapsack of its own (`align.knapsack`): the most value in at most
k_c experts whose time fits into what the deadline leaves,

    max sum_e x_e (v_e - price T_e)   s. t.   sum_e x_e T_e <= room,   sum_e x_e <= k_c,

with T_e and the room in deadlines, on the link as the server knows it (`times`). The
paper asks for decisions by channel and latency (section IV.C) and gives no formula;
the objective, its scale and the greedy solution are this project's choice.

Experts of a model are equally large, and T_e is the same for all experts of a client,
unless they are pruned (`prune.expect_shares`). So without pruning the channel says how
many experts a client takes and, by the price, how much the last of them must be worth;
which ones is for the data to say.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmoe_jax.align.desirability import desirability
from fedmoe_jax.align.explore import explore
from fedmoe_jax.align.knapsack import Items, fill_knapsack
from fedmoe_jax.align.ties import draw_lots
from fedmoe_jax.align.top_k import fill_slots
from fedmoe_jax.base import Strategy
from fedmoe_jax.options import NON_NEGATIVE, TRACED, Option
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes

# (evidence, hyper, key) -> value of each expert for each client, [C, E]
ValueFn = Callable[[Evidence, Hyper, Array], Array]


def value_jointly(evidence: Evidence, hyper: Hyper, key: Array) -> Array:
    """The desirability, raised by `weights.usage` so that none is below 0: [C, E].

    An expert that does not suit the client and is trained the most is worth nothing,
    and without a price every client takes as many as it can, as in `load_balanced`.
    """
    worth = desirability(evidence.fitness, evidence.usage, hyper)
    return explore(worth + hyper.weights.usage, evidence, hyper, key)


def value_alike(evidence: Evidence, hyper: Hyper, key: Array) -> Array:
    """Every expert is worth 1, whatever it is: [C, E]."""
    return jnp.ones(evidence.fitness.shape)


def assign(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array, *, value: ValueFn
) -> Assignment:
    """The knapsack of each client; equal experts are drawn, best first in the slots."""
    times = evidence.times
    assert times is not None  # the strategy is timed
    worth = value(evidence, hyper, key)
    worth = jnp.where(jnp.isfinite(worth), worth, 0.0)
    net = worth - hyper.channel_aware.price * times.expert
    lots = draw_lots(key, evidence.client, sizes.num_experts)
    slots = jnp.clip(evidence.capacity, 1, sizes.max_held)
    items = Items(net, times.expert, times.room, slots, lots)
    taken = jax.vmap(fill_knapsack)(items)
    order = jnp.lexsort((-net, ~taken), axis=1)[:, : sizes.max_held]
    slot = fill_slots(taken.sum(axis=1), sizes.max_held)
    return Assignment(order.astype(jnp.int32), slot)


OPTIONS = (
    Option(
        "channel_aware.price",
        NON_NEGATIVE,
        "mu: what an expert must be worth to a client for each deadline of the round "
        "that it takes, of a desirability from 0 to weights.fitness + weights.usage; "
        "of channel_only 1 each; 0: nothing",
        TRACED,
    ),
)

CHANNEL_AWARE = Strategy(
    assign=functools.partial(assign, value=value_jointly),
    about=(
        "Gives each client the experts of highest desirability less the price of their "
        "time on its link as the server knows it, as many as fit into the deadline."
    ),
    timed=True,
    options=OPTIONS,
)

CHANNEL_ONLY = Strategy(
    assign=functools.partial(assign, value=value_alike),
    about=(
        "Gives each client as many experts as fit into the deadline on its link as the "
        "server knows it, the fastest first, whatever they know."
    ),
    timed=True,
    options=OPTIONS,
)
