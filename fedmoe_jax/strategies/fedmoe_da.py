"""FedMoE-DA (arXiv 2411.02115): clients mix their experts with the most similar ones.

From the published description and a port that cites its equations 8 to 11. The row of a
client's gate stands for its expert; experts travel between clients, not by the server.
Chosen here: the clients of a cohort mix with each other, stem and head are averaged.
Clients that have not met when weights were renewed mix from the next renewal on, so
that the system needs cohorts that meet again, at best all clients in every round.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.align.top_k import hold_all
from fedmoe_jax.base import ALL_EXPERTS, Strategy
from fedmoe_jax.options import COUNT, POSITIVE, TRACED, Option, Range
from fedmoe_jax.types import Array, Evidence, Hyper, PyTree, Sizes

UNKNOWN = -2.0  # less than any cosine


def find_similar(rows: Array) -> Array:
    """Cosine similarity [n, n] of gate rows [n, D] of experts."""
    unit = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return jnp.einsum("id,jd->ij", unit, unit)


def mixing_weights(similar: Array, neighbours: Array, temperature: Array) -> Array:
    """The share of every expert in every mixture: [n, n] float32, rows sum to 1.

    A softmax of similarities over the expert itself and the most similar others.

    Args:
      similar: [n, n] float32 cosines, `UNKNOWN` where rows have not been shown.
      neighbours: [] how many others each expert is mixed with, at most.
      temperature: [] > 0.
    """
    itself = jnp.eye(len(similar), dtype=bool)
    order = jnp.argsort(-jnp.where(itself, jnp.inf, similar), axis=1)
    kept = jnp.argsort(order, axis=1) <= neighbours  # itself comes first
    kept &= similar > UNKNOWN
    scaled = jnp.where(kept, similar / temperature, -jnp.inf)
    return jax.nn.softmax(scaled, axis=1)


def init(sizes: Sizes) -> PyTree:
    """Before the first round every expert is known to be like itself only."""
    itself = jnp.eye(sizes.num_clients * sizes.num_experts, dtype=bool)
    return {"similar": jnp.where(itself, jnp.float32(1), UNKNOWN)}


def exchange(
    personal: PyTree, state: PyTree, evidence: Evidence, arrived: Array, hyper: Hyper
) -> tuple[PyTree, PyTree, Array, Array]:
    """Mixes the experts of the cohort; its similarities are renewed every `period`.

    Clients whose round did not count, `arrived` [C] false, take no part.
    """
    (gate,) = personal["gate"].values()
    rows, (similar,) = gate["kernel"], state["similar"]  # [N, E, D] and [N E, N E]
    num_experts, numbers = rows.shape[1], hyper.fedmoe_da
    mine = evidence.client[:, None] * num_experts + jnp.arange(num_experts)[None]
    mine = mine.reshape(-1)  # [C * E], of all N * E experts
    block = mine[:, None], mine[None]
    fresh = find_similar(rows.reshape(-1, rows.shape[-1])[mine])
    there = jnp.repeat(arrived, num_experts)
    both = there[:, None] & there[None]
    due = (evidence.round % numbers.period == 0) & both
    newest = jnp.where(due, fresh, similar[block])
    known = jnp.where(both | jnp.eye(len(mine), dtype=bool), newest, UNKNOWN)
    mixing = mixing_weights(known, numbers.neighbours, numbers.temperature)

    def mix(leaf: Array) -> Array:
        flat = leaf.reshape(-1, *leaf.shape[2:])
        mixed = jnp.tensordot(mixing, flat[mine], axes=1)
        return flat.at[mine].set(mixed).reshape(leaf.shape)

    experts = jax.tree.map(mix, personal["experts"])
    renewed = similar.at[block].set(newest)[None]
    mixed = personal | {"experts": experts}
    return mixed, {"similar": renewed}, *count_sent(mixing, num_experts)


def count_sent(mixing: Array, num_experts: int) -> tuple[Array, Array]:
    """Experts that each client sends to and receives from others, [C] float32 each.

    An expert that several of another client's are mixed with goes to it once.
    """
    count = len(mixing) // num_experts
    used = (mixing > 0).reshape(count, num_experts, count, num_experts)
    taken = used.any(axis=1).sum(axis=2)  # [C, C], to and from which client
    taken = jnp.where(jnp.eye(count, dtype=bool), 0, taken).astype(jnp.float32)
    return taken.sum(axis=0), taken.sum(axis=1)


def configure(config: ConfigDict) -> ConfigDict:
    """Every client has a slot for every expert."""
    config.max_held = config.num_experts
    return config


def show_gates(hyper: Hyper) -> Array:
    """Clients show their gate rows whenever similarities are renewed."""
    return hyper.fedmoe_da.period


FEDMOE_DA = Strategy(
    about=(
        "Every client has all experts for itself and mixes each with the most similar "
        "ones of the cohort, judged by gate rows."
    ),
    assign=hold_all,
    needs="all experts on every client, and links between clients",
    options=(
        Option(
            "fedmoe_da.neighbours",
            COUNT,
            "most similar experts that each expert is mixed with",
            TRACED,
        ),
        Option(
            "fedmoe_da.temperature",
            POSITIVE,
            "temperature of the softmax over similarities",
            TRACED,
        ),
        Option(
            "fedmoe_da.period",
            COUNT,
            "rounds from one renewal of the weights to the next",
            TRACED,
        ),
    ),
    allowed=(("num_active", Range(2)),),  # else nothing trains the gate
    configure=configure,
    init=init,
    exchange=exchange,
    personal=("gate", "experts"),
    local_experts=ALL_EXPERTS,
    gate_period=show_gates,
    every_expert=True,
    one_layer=True,
)
