"""FedMoE (arXiv 2408.11304): each client's sub-model from what it activates.

From the published description; the thresholds of its search and the formula of its
recommendations could not be read. Chosen here: in its first `warm_up` rounds a client
trains all experts; then it keeps the smallest set of experts that answers a share
`coverage` of its routing, as far as it has room; after every `period` further rounds it
swaps its least used expert for the one that similar clients of the cohort hold most;
where its room shrinks, it keeps its most used ones.
An expert that no client holds stays, one that one client holds is copied from it,
others are averaged; gate rows alike.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.align.ties import draw_lots, first_by_lot, top_k_by_lot
from fedmoe_jax.align.top_k import give_all_slots
from fedmoe_jax.base import Strategy
from fedmoe_jax.options import COUNT, SHARE, TRACED, Option
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    PyTree,
    Sizes,
)


def cover(frequency: Array, coverage: Array) -> Array:
    """[C] int32 >= 1, number of most used experts that reach the share `coverage`.

    Args:
      frequency: [C, E] float32, shares of each client's routing.
      coverage: [] float32 in [0, 1].
    """
    descending = -jnp.sort(-frequency, axis=1)
    before = jnp.cumsum(descending, axis=1) - descending
    return jnp.maximum((before < coverage * descending.sum(1)[:, None]).sum(1), 1)


def vote(frequency: Array, held: Array) -> Array:
    """Votes [C, E] of the other clients for what they hold, by cosine similarity."""
    length = jnp.linalg.norm(frequency, axis=1, keepdims=True)
    unit = frequency / jnp.maximum(length, 1e-9)
    similar = jnp.einsum("ce,de->cd", unit, unit)
    similar = jnp.where(jnp.eye(len(held), dtype=bool), 0.0, similar)
    return jnp.einsum("cd,de->ce", similar, held.astype(jnp.float32))


def recommend(frequency: Array, held: Array, lots: Array) -> Array:
    """Swaps each client's least used expert for the most voted one: [C, E] bool.

    A client keeps what it has where it holds only one, or others hold nothing else.
    Lots [C, E] decide ties.
    """
    votes = jnp.where(held, -1.0, vote(frequency, held))
    new = first_by_lot(votes, lots)
    least = first_by_lot(jnp.where(held, -frequency, -jnp.inf), lots)
    row = jnp.arange(len(held))
    swapped = held.at[row, least].set(False).at[row, new].set(True)
    useful = (votes.max(axis=1) > 0) & (held.sum(axis=1) > 1)
    return jnp.where(useful[:, None], swapped, held)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """All experts in a client's warm-up, then its own sub-model."""
    num_experts = sizes.num_experts
    frequency = evidence.state["frequency"][evidence.client]
    since = evidence.state["rounds"][evidence.client] - hyper.fedmoe.warm_up  # [C]
    room = jnp.minimum(cover(frequency, hyper.fedmoe.coverage), evidence.capacity)
    due = (since > 0) & (since % hyper.fedmoe.period == 0)
    lots = draw_lots(key, evidence.client, num_experts)
    swapped = recommend(frequency, evidence.held, lots)
    kept = jnp.where(due[:, None], swapped, evidence.held)
    mine = jnp.where(kept, 1 + frequency, 0.0)
    scores = jnp.where((since > 0)[:, None], mine, frequency)
    count = jnp.minimum(evidence.held.sum(axis=1), evidence.capacity)
    count = jnp.where(since > 0, count, room)
    count = jnp.where(since < 0, num_experts, count)
    return top_k_by_lot(scores, count, num_experts, evidence.client, key)


def init(sizes: Sizes) -> PyTree:
    """No client's routing is known before its first round."""
    return {
        "frequency": jnp.zeros((sizes.num_clients, sizes.num_experts)),
        "rounds": jnp.zeros(sizes.num_clients, jnp.int32),
    }


def update(
    evidence: Evidence,
    assignment: Assignment,
    feedback: Feedback,
    reports: PyTree,
    hyper: Hyper,
) -> PyTree:
    """Moves the routing shares of held experts towards the newest ones.

    The routing of a sub-model is scaled to the share that its experts had in all.
    """
    state, client = evidence.state, evidence.client
    frequency = state["frequency"]
    old = frequency[client[:, None], assignment.held]
    old = jnp.where(assignment.slot, old, 0.0)
    known = old.sum(axis=1, keepdims=True)
    rate = jnp.where(known > 0, hyper.fitness.rate, 1.0)
    newest = jnp.where(known > 0, known, 1.0) * feedback.frequency
    trained = feedback.load.sum(axis=1) > 0
    filled = assignment.slot & trained[:, None]
    expert = jnp.where(filled, assignment.held, frequency.shape[1])
    new = old + rate * (newest - old)
    return {
        "frequency": frequency.at[client[:, None], expert].set(new, mode="drop"),
        "rounds": state["rounds"].at[client].add(trained.astype(jnp.int32)),
    }


def configure(config: ConfigDict) -> ConfigDict:
    """A slot for every expert; holders merge gate rows; cross-entropy is the loss."""
    config.gate.mode, config.loss.calibration = "holder_rows", 0.0
    return give_all_slots(config)


FEDMOE = Strategy(
    about=(
        "Gives each client the experts that it used most in a warm-up with all of "
        "them, and lets similar clients recommend others."
    ),
    assign=assign,
    needs="all experts on every client during the warm-up",
    options=(
        Option(
            "fedmoe.warm_up",
            COUNT,
            "first rounds of each client, with all experts",
            TRACED,
        ),
        Option(
            "fedmoe.coverage",
            SHARE,
            "share of its routing that a sub-model answers",
            TRACED,
        ),
        Option(
            "fedmoe.period",
            COUNT,
            "rounds from one recommendation to the next",
            TRACED,
        ),
    ),
    allowed=(("gate.mode", ("global", "holder_rows")),),
    at_most=(("fedmoe.warm_up", "num_rounds"),),
    configure=configure,
    init=init,
    update=update,
)

FEDMOE_SHARED_GATE = FEDMOE._replace(
    about="Chooses experts as fedmoe does, with gate, loss and weights of all systems.",
    allowed=(),
    configure=give_all_slots,
)
