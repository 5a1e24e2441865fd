"""The floors of a run: the queues in its state, what they ask, and their numbers.

`fairness.floor` is of the rounds in which each client counts, `fairness.expert_floor`
of the clients of each capacity that train an expert of high value; the rules are those
of `align.queues`. What is off has no queue: the state has `{}` in its place, and the
round is the one without it.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.queues import (
    TierPressure,
    Tiers,
    find_top,
    init_tiers,
    serve_clients,
    serve_tiers,
)
from fedmoe_jax.moe_layers import map_layers
from fedmoe_jax.program import Program
from fedmoe_jax.reply import Reply
from fedmoe_jax.types import (
    AlignState,
    Array,
    Assignment,
    Evidence,
    Hyper,
    PyTree,
    SimState,
)
from fedmoe_jax.upcycle import is_warming

CLIENTS, TIERS = "clients", "tiers"  # names of the queues in `SimState.queues`


def init_queues(program: Program) -> dict[str, PyTree]:
    """The queues of the floors that are on, all empty, see `SimState.queues`."""
    sizes, on, queues = program.sizes, program.static.fairness, {}
    if on.floor:
        queues[CLIENTS] = jnp.zeros(sizes.num_clients)
    if on.expert_floor:
        row = lambda leaf: jnp.tile(leaf[None], (sizes.num_layers, 1))
        queues[TIERS] = jax.tree.map(row, init_tiers(sizes.max_capacity))
    return queues


def press_cohort(state: SimState, hyper: Hyper) -> Array | None:
    """Z / V of every client, [N] float32 >= 0; None without a floor.

    The largest sum of `luck + Z / V` is that of `V luck + Z`: drift plus penalty with
    the luck of the draw as the gain.
    """
    if CLIENTS not in state.queues:
        return None
    return state.queues[CLIENTS] / hyper.fairness.tradeoff


def find_top_experts(align: AlignState, local_experts: int) -> Array:
    """The experts of high value of every layer, by mean fitness of all clients.

    Args:
      align: gives `fitness` [N, G, E].
      local_experts: see `align.queues.find_top`.

    Returns:
      [G, E] bool.
    """
    value = align.fitness.mean(axis=0)
    return jax.vmap(find_top, (0, None))(value, local_experts)


def press_tiers(state: SimState, program: Program) -> TierPressure | None:
    """What the tiers ask of a round's assignment, leaves [G, ...]; None if off."""
    if TIERS not in state.queues:
        return None
    top = find_top_experts(state.align, program.strategy.local_experts)
    return TierPressure(state.queues[TIERS].queue, top)


def serve(
    state: SimState,
    evidence: Evidence,
    assignment: Assignment,
    pressure: TierPressure | None,
    replies: Reply,
    hyper: Hyper,
    program: Program,
) -> dict[str, PyTree]:
    """The queues after a round.

    Those of tiers stand still in a dense warm-up, when all clients train one expert.

    Args:
      state: before the round.
      evidence: of its cohort.
      assignment: what the cohort was to hold, leaves [C, G, ...].
      pressure: of the tiers in the round.
      replies: of the cohort; experts that a client has not chosen do not count.
      hyper: gives the floors.
      program: the static parts.
    """
    queues, floors = dict(state.queues), hyper.fairness
    if CLIENTS in queues:
        own = evidence.client, replies.arrived
        queues[CLIENTS] = serve_clients(queues[CLIENTS], *own, floors.floor)
    if pressure is None:
        return queues
    if replies.chosen is not None:
        assignment = assignment.replace(slot=replies.chosen)

    def serve_layer(tiers: Tiers, assignment: Assignment, top: Array) -> Tiers:
        own = evidence.capacity, replies.arrived
        return serve_tiers(tiers, assignment, *own, top, floors.expert_floor)

    over_layers = map_layers(serve_layer, program.sizes.num_layers, (0, 1, 0))
    tiers = over_layers(queues[TIERS], assignment, pressure.top)
    if program.static.upcycled:
        warming = is_warming(state.round, hyper)
        still = lambda old, new: jnp.where(warming, old, new)
        tiers = jax.tree.map(still, queues[TIERS], tiers)
    return queues | {TIERS: tiers}


def measure_queues(queues: dict[str, PyTree]) -> dict[str, Array]:
    """The longest queues, and how the tier that is served least is served.

    `longest_queue` over the number of rounds is the most by which a client can be below
    its floor. `least_tier_share` [] in [0, 1] is the mean over rounds of the share of a
    tier's clients that have trained a top expert, NaN before any.
    """
    found = {}
    if CLIENTS in queues:
        found["longest_queue"] = queues[CLIENTS].max()
    if TIERS in queues:
        tiers = queues[TIERS]
        found["longest_tier_queue"] = tiers.queue.max()
        found["least_tier_share"] = jnp.nanmin(tiers.served / tiers.rounds)
    return found
