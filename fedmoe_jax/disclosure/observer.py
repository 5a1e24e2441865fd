"""What a server, or a listener on the link, sees of each client in one round.

A listener sees who takes part, which experts go to and fro, and how many bytes; the
server sees the feedback, too, as clients report it. What lies inside an update is
looked at once, at the end of a run, see `exposure`.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.metrics import add_exchange
from fedmoe_jax.models.submodel import held_mask, is_local
from fedmoe_jax.program import Program
from fedmoe_jax.reply import Reply
from fedmoe_jax.types import Array, Assignment, Feedback
from fedmoe_jax.world.costs import client_bytes
from fedmoe_jax.world.outcome import Conditions

OBSERVED = "observed"  # among the metrics of a round, a dict of its own
# Numbers of the feedback that are kept, by name; `probe` only where clients probe.
REPORTED = ("accuracy", "loss", "frequency", "load", "peak")


def mask_slots(held: Array, slot: Array, num_experts: int) -> Array:
    """Experts in valid slots, [C, G, E] bool, of slots [C, G, K]."""
    one = lambda held, slot: held_mask(held, slot, num_experts)
    return jax.vmap(jax.vmap(one))(held, slot)


def see_held(assignment: Assignment, replies: Reply, program: Program) -> Array:
    """The held sets as the link shows them: [C, G, E] bool.

    Those that clients ask for where that is randomised; those that come back where
    clients choose; else those that are assigned, but for what stays with a client.
    Nothing of a client out of reach, or where nothing travels.

    Args:
      assignment: leaves [C, G, ...].
      replies: of the cohort.
      program: the static parts.
    """
    num_experts = program.sizes.num_experts
    slot = assignment.slot if replies.chosen is None else replies.chosen
    local = is_local(assignment.held, num_experts, program.strategy.local_experts)
    seen = assignment.asked
    if seen is None:
        seen = mask_slots(assignment.held, slot & ~local, num_experts)
    begun = replies.outcome.spent[:, 0] > 0
    return seen & begun[:, None, None] & (not program.strategy.silent)


def see_feedback(
    assignment: Assignment, replies: Reply, num_experts: int
) -> dict[str, Array]:
    """Every number of the feedback as the server gets it: [C, G, E] float32 each.

    NaN of experts that a client has not trained, of the probe not received, and of
    clients whose update is lost.

    Args:
      assignment: leaves [C, G, ...].
      replies: of the cohort.
      num_experts: E.
    """
    arrived = replies.arrived[:, None, None]
    client, layer = jnp.indices(assignment.slot.shape[:2])
    place = client[..., None], layer[..., None]
    shape = *assignment.slot.shape[:2], num_experts

    def spread(values: Array, slot: Array) -> Array:
        expert = jnp.where(slot & arrived, assignment.held, num_experts)
        empty = jnp.full(shape, jnp.nan)
        return empty.at[(*place, expert)].set(values, mode="drop")

    trained = assignment.slot if replies.chosen is None else replies.chosen
    feedback: Feedback = replies.feedback
    found = {name: spread(getattr(feedback, name), trained) for name in REPORTED}
    if feedback.probe is not None:
        found["probe"] = spread(feedback.probe, assignment.slot)
    return found


def see_round(
    assignment: Assignment,
    conditions: Conditions,
    replies: Reply,
    exchanged: tuple[Array, Array],
    program: Program,
) -> dict[str, Array]:
    """The observation of a round.

    Args:
      assignment: leaves [C, G, ...].
      conditions: of the cohort's work, leaves [C].
      replies: of the cohort.
      exchanged: see `metrics.account`.
      program: the static parts.

    Returns:
      `client` [C] int32, `held` [C, G, E] bool, `bytes_up` and `bytes_down` [C]
      float32, of the feedback `REPORTED` and `probe`, [C, G, E] float32, and where
      clients ask for others than the server has given them, `assigned` [C, G, E] bool.
    """
    traffic = add_exchange(conditions.traffic, replies.sent, exchanged, program)
    up, down = client_bytes(program.costs, traffic)
    spent = replies.outcome.spent
    silent = program.strategy.silent
    feedback = see_feedback(assignment, replies, program.sizes.num_experts)
    decided = {}
    if assignment.assigned is not None:
        begun = (spent[:, 0] > 0)[:, None, None]
        decided["assigned"] = assignment.assigned & begun
    unheard = lambda leaf: jnp.full_like(leaf, jnp.nan) if silent else leaf
    return {
        "client": conditions.client,
        "held": see_held(assignment, replies, program),
        "bytes_up": spent[:, 2] * up,
        "bytes_down": spent[:, 0] * down,
        **decided,
        **jax.tree.map(unheard, feedback),
    }
