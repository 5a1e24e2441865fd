"""FedMoE-DA (arXiv 2411.02115): clients mix their experts with the most similar ones.

From the published description and a port that cites its equations 8 to 11. The row of a
client's gate stands for its expert; experts travel between clients, not by the server.
Chosen here: the clients of a cohort mix with each other, stem and head are averaged.
Similarities are those of the rows that clients showed at their last renewal; one that
has shown none yet mixes from its first renewal on. So what is kept grows with N, as the
gates do, and no matrix of all pairs of experts is.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.top_k import give_all_slots, hold_all
from fedmoe_jax.base import ALL_EXPERTS, Strategy
from fedmoe_jax.options import COUNT, POSITIVE, TRACED, Option, Range
from fedmoe_jax.types import Array, Evidence, Hyper, PyTree, Sizes

UNKNOWN = -2.0  # less than any cosine


def scale_rows(rows: Array) -> Array:
    """Gate rows [..., D] of length 1; zeros stay."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def mixing_weights(
    similar: Array, itself: Array, neighbours: Array, temperature: Array
) -> tuple[Array, Array]:
    """The shares of ONE client's E mixtures, of the most similar experts first.

    A softmax of similarities over the expert itself and the most similar others.

    Args:
      similar: [E, n] float32 cosines of its experts and all n of the cohort,
        `UNKNOWN` of those it does not mix with.
      itself: [E] int32, the place of each expert among the n.
      neighbours: [] how many others each expert is mixed with, at most.
      temperature: [] > 0.

    Returns:
      [E, n] int32, places among the n, the expert's own first; [E, n] float32, their
      shares, rows sum to 1, zero beyond `neighbours`.
    """
    own = itself[:, None] == jnp.arange(similar.shape[1])[None]
    known = jnp.where(own, 1.0, similar)  # its cosine with itself
    order = jnp.argsort(-jnp.where(own, jnp.inf, known), axis=1)
    ranked = jnp.take_along_axis(known, order, axis=1)
    kept = jnp.arange(similar.shape[1])[None] <= neighbours
    kept &= ranked > UNKNOWN
    scaled = jnp.where(kept, ranked / temperature, -jnp.inf)
    return order, jax.nn.softmax(scaled, axis=1)


def init(sizes: Sizes) -> PyTree:
    """Before the first round no client has shown a gate row: all are zero."""
    shape = sizes.num_clients, sizes.num_experts, sizes.gate_width
    return {"shown": jnp.zeros(shape)}


def exchange(
    personal: PyTree, state: PyTree, evidence: Evidence, arrived: Array, hyper: Hyper
) -> tuple[PyTree, PyTree, Array, Array]:
    """Mixes the experts of the cohort by the gate rows that its clients last showed.

    Clients whose round did not count, `arrived` [C] false, take no part. One client
    mixes after the other, so that memory follows C, not its square.
    """
    (gate,) = personal["gate"].values()
    rows, (shown,), cohort = gate["kernel"], state["shown"], evidence.client
    numbers, num_experts = hyper.fedmoe_da, rows.shape[1]
    due = (evidence.round % numbers.period == 0) & arrived
    newest = jnp.where(due[:, None, None], rows[cohort], shown[cohort])  # [C, E, D]
    takes_part = arrived & newest.any((1, 2))
    units = scale_rows(newest).reshape(-1, rows.shape[-1])  # [n, D], n = C E
    mixes = jnp.repeat(takes_part, num_experts)
    flat = lambda leaf: leaf[cohort].reshape(-1, *leaf.shape[2:])
    experts = jax.tree.map(flat, personal["experts"])

    def mix(sent: Array, client: Array) -> tuple[Array, tuple[PyTree, Array]]:
        itself = client * num_experts + jnp.arange(num_experts)
        cosines = jnp.einsum("ed,nd->en", units[itself], units)
        both = mixes & takes_part[client]
        similar = jnp.where(both[None], cosines, UNKNOWN)
        order, weights = mixing_weights(
            similar, itself, numbers.neighbours, numbers.temperature
        )
        mixed = mix_experts(experts, order, weights, numbers.neighbours)
        taken = count_taken(order, weights, client)
        return sent + taken, (mixed, taken.sum())

    places = jnp.arange(len(cohort))
    sent, (mixed, received) = jax.lax.scan(mix, jnp.zeros(len(cohort)), places)
    place = lambda leaf, new: leaf.at[cohort].set(new)
    renewed = personal | {"experts": jax.tree.map(place, personal["experts"], mixed)}
    return renewed, {"shown": shown.at[cohort].set(newest)[None]}, sent, received


def mix_experts(
    experts: PyTree, order: Array, weights: Array, neighbours: Array
) -> PyTree:
    """The E mixtures of ONE client; the work follows the neighbours, not the cohort.

    Args:
      experts: of the cohort, leaves [n, ...].
      order: [E, n] int32, see `mixing_weights`.
      weights: [E, n] float32, likewise.
      neighbours: [] int32.
    """

    def add(rank: Array, total: PyTree) -> PyTree:
        def add_leaf(total: Array, leaf: Array) -> Array:
            weight = weights[:, rank].reshape((-1,) + (1,) * (leaf.ndim - 1))
            return total + weight * leaf[order[:, rank]]

        return jax.tree.map(add_leaf, total, experts)

    shape = lambda leaf: (len(order), *leaf.shape[1:])
    zero = jax.tree.map(lambda leaf: jnp.zeros(shape(leaf), leaf.dtype), experts)
    most = jnp.minimum(neighbours + 1, order.shape[1])
    return jax.lax.fori_loop(0, most, add, zero)


def count_taken(order: Array, weights: Array, client: Array) -> Array:
    """Experts that ONE client receives from each of the cohort, [C] float32.

    An expert that several of its own are mixed with goes to it once.

    Args:
      order: [E, n] int32, see `mixing_weights`.
      weights: [E, n] float32, likewise.
      client: [] int32, its place in the cohort.
    """
    num_experts, total = order.shape
    used = jnp.zeros(total, bool).at[order].max(weights > 0)
    taken = used.reshape(-1, num_experts).sum(axis=1).astype(jnp.float32)
    return taken.at[client].set(0.0)


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
    configure=give_all_slots,
    init=init,
    exchange=exchange,
    personal=("gate", "experts"),
    local_experts=ALL_EXPERTS,
    gate_period=show_gates,
    every_expert=True,
    one_layer=True,
)
