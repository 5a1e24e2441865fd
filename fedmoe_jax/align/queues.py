"""Virtual queues: a long-run floor as a pressure on the decisions of single rounds.

Drift plus penalty, as RBCS-F (arXiv 2011.01783) has it for cohorts: the constraint that
a mean over rounds of x is a floor at least becomes a queue, `Z <- max(Z + floor - x,
0)`, and each round decides for the largest sum of V times its own gain and Z x. Z grows
by at least what a round falls short of the floor, so that after T rounds from Z = 0

    mean x >= floor - Z / T

whatever has happened: where Z stays bounded, the floor is met in the long run. V trades
gain for the time that it takes.

Two kinds of queue are here. One for each client, x being whether its update has
counted. And, of ONE MoE layer, one for each capacity, x being the share of the clients
with that capacity that have trained an expert of high value. Which experts these are,
that capacities are the tiers, and how assignments yield to the queue is this project's
choice; no source for it was found.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.models.submodel import held_mask, is_local
from fedmoe_jax.types import Array, Assignment


class Tiers(struct.PyTreeNode):
    """The queues of the tiers of ONE layer; tier k is clients of capacity k, 1 to K.

    Attributes:
      queue: [K] float32 >= 0.
      rounds: [K] int32, rounds in which an update of the tier has counted.
      served: [K] float32, the sum over these rounds of the share of such clients that
        have trained a top expert.
    """

    queue: Array
    rounds: Array
    served: Array


class TierPressure(struct.PyTreeNode):
    """What the tiers ask of the assignment of ONE layer.

    Attributes:
      queue: [K] float32 >= 0, of each tier.
      top: [E] bool, the experts of high value.
    """

    queue: Array
    top: Array


def step_queue(queue: Array, floor: Array, served: Array) -> Array:
    """`max(queue + floor - served, 0)` of queues of any shape, see the module."""
    return jnp.maximum(queue + floor - served, 0.0)


# ---- clients


def serve_clients(queue: Array, cohort: Array, arrived: Array, floor: Array) -> Array:
    """The queues of all clients after a round: [N] float32 >= 0.

    Args:
      queue: [N] float32, before the round.
      cohort: [C] int32, distinct client ids.
      arrived: [C] bool, whether the client's update counts.
      floor: [] in [0, 1], least long-run share of the rounds.
    """
    chex.assert_equal_shape([cohort, arrived])
    served = jnp.zeros_like(queue).at[cohort].set(arrived.astype(queue.dtype))
    return step_queue(queue, floor, served)


# ---- tiers


def init_tiers(num_tiers: int) -> Tiers:
    """Before the first round nothing is due."""
    nothing = jnp.zeros(num_tiers)
    return Tiers(queue=nothing, rounds=nothing.astype(jnp.int32), served=nothing)


def find_top(value: Array, local_experts: int) -> Array:
    """The half of the experts, rounded up, of the highest value: [E] bool.

    Args:
      value: [E] float32; of equals the first ones are taken.
      local_experts: the last experts, as many, stay with the clients and never count.
    """
    num_experts = value.shape[0]
    shared = ~is_local(jnp.arange(num_experts), num_experts, local_experts)
    half = -(-(num_experts - local_experts) // 2)
    best = jax.lax.top_k(jnp.where(shared, value, -jnp.inf), half)[1]
    return jnp.zeros(num_experts, bool).at[best].set(True)


def take_top(
    held: Array,
    slot: Array,
    fitness: Array,
    queue: Array,
    top: Array,
    tradeoff: Array,
    local_experts: int,
) -> Array:
    """The experts [K] of ONE client in its slots, once its tier has had its say.

    A client that holds no top expert swaps the least fit of its own for the fittest top
    one, where the queue is longer than V times the fitness that it gives up by that.
    Experts that stay with the client never move.

    Args:
      held: [K] int32, expert ids.
      slot: [K] bool, which of them count.
      fitness: [E] float32, of the client.
      queue: [] float32, of its tier.
      top: [E] bool.
      tradeoff: V, [] > 0.
      local_experts: see `find_top`.
    """
    mine = held_mask(held, slot, fitness.shape[0])
    movable = slot & ~is_local(held, fitness.shape[0], local_experts)
    least = jnp.argmin(jnp.where(movable, fitness[held], jnp.inf))
    best = jnp.argmax(jnp.where(top, fitness, -jnp.inf)).astype(held.dtype)
    given_up = jnp.maximum(fitness[held[least]] - fitness[best], 0.0)
    lacks = ~(mine & top).any() & top.any() & movable.any()
    due = lacks & (queue > tradeoff * given_up)
    return jnp.where(due, held.at[least].set(best), held)


def lift_tiers(
    assignment: Assignment,
    fitness: Array,
    capacity: Array,
    pressure: TierPressure,
    tradeoff: Array,
    local_experts: int,
) -> Assignment:
    """The assignment of a cohort in ONE layer, with top experts where tiers need them.

    Args:
      assignment: the strategy's.
      fitness: [C, E] float32.
      capacity: [C] int32 in [1, K], each client's tier.
      pressure: of the tiers.
      tradeoff: V, [] > 0.
      local_experts: see `find_top`.
    """

    def lift(held: Array, slot: Array, fitness: Array, tier: Array) -> Array:
        own = pressure.queue[tier - 1], pressure.top
        return take_top(held, slot, fitness, *own, tradeoff, local_experts)

    held = jax.vmap(lift)(assignment.held, assignment.slot, fitness, capacity)
    chex.assert_equal_shape([held, assignment.held])
    return assignment.replace(held=held)


def serve_tiers(
    tiers: Tiers,
    assignment: Assignment,
    capacity: Array,
    arrived: Array,
    top: Array,
    floor: Array,
) -> Tiers:
    """The tiers of ONE layer after a round; one without an update stays as it was.

    Args:
      tiers: before the round.
      assignment: the experts that the cohort has trained, [C, K].
      capacity: [C] int32 in [1, K], each client's tier.
      arrived: [C] bool, whether the client's update counts.
      top: [E] bool, the experts of high value.
      floor: [] in [0, 1], least long-run share of a tier's clients.
    """
    has_top = (assignment.slot & top[assignment.held]).any(axis=1)
    member = jax.nn.one_hot(capacity - 1, tiers.queue.shape[0])  # [C, K]
    member = jnp.where(arrived[:, None], member, 0.0)
    count = member.sum(axis=0)
    share = (member * has_top[:, None]).sum(axis=0) / jnp.maximum(count, 1.0)
    seen = count > 0
    queue = step_queue(tiers.queue, floor, share)
    return Tiers(
        queue=jnp.where(seen, queue, tiers.queue),
        rounds=tiers.rounds + seen,
        served=tiers.served + share,
    )
