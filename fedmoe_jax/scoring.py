"""What the gates are asked about one batch of test images, and which pairs they need.

* global: the top-A of all E experts; also softly over all E.
* personal: the top-A of each client's held experts.

Where parts of the model are personal the server has none of them, and each client's own
model is asked the global questions as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.models.image_moe import apply_experts
from fedmoe_jax.models.routing import gate_logits, route
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Federation, PyTree, SimState


class Images(NamedTuple):
    """One batch of test images as gates see it.

    Attributes:
      batch: of the task, leaves [B, ...].
      features: [B, ...] float, output of the server's stem.
      logits: [B, E] float of the server's gate, None where gates are personal.
      y: [B] int32 labels, -1 for padding.
      label: [B, L] float, one-hot labels, zero rows for padding.
    """

    batch: PyTree
    features: Array
    logits: Array | None
    y: Array
    label: Array


class ClientView(NamedTuple):
    """ONE client that is asked (a leading N axis for all of them).

    Attributes:
      personal: the client's own parts, {} where the server's serve all.
      held: [E] bool, the experts it routes among.
      wanted: [L] float, 1 for labels that the client has, else 0.
    """

    personal: PyTree
    held: Array
    wanted: Array


def view_clients(state: SimState, federation: Federation) -> ClientView:
    """All clients [N]; one that never took part holds nothing and may use all.

    Where the data are pooled it is one, with the labels of all.
    """
    held = state.align.held[:, 0]
    mix = federation.label_mix.reshape(len(held), -1, federation.label_mix.shape[1])
    return ClientView(
        personal=state.personal,
        held=held | ~held.any(axis=1, keepdims=True),
        wanted=(mix.sum(axis=1) > 0).astype(jnp.float32),
    )


def own_logits(client: ClientView, images: Images) -> Array:
    """[B, E] gate logits of ONE client: the server's, unless gates are personal."""
    if "gate" not in client.personal:
        return images.logits
    return gate_logits(client.personal["gate"]["moe"], images.features)


def route_all(logits: Array, num_active: int) -> Array:
    """[B, E] gates of the top-A of all experts."""
    return route(logits, jnp.ones(logits.shape[1], bool), num_active)


def find_needed(images: Images, clients: ClientView, num_active: int) -> Array:
    """Pairs that the server, or a client that has the image's label, routes to.

    Args:
      images: one batch.
      clients: all clients [N].
      num_active: A.

    Returns:
      [B, E] bool, false for padding.
    """
    real = images.y[:, None] >= 0

    def add(need: Array, client: ClientView) -> tuple[Array, None]:
        logits = own_logits(client, images)
        wanted = (images.label @ client.wanted)[:, None] > 0
        need |= wanted & (route(logits, client.held, num_active) > 0)
        if client.personal:
            need |= real & (route_all(logits, num_active) > 0)
        return need, None

    if images.logits is None:
        need = jnp.zeros((images.y.shape[0], clients.held.shape[1]), bool)
    else:
        need = real & (route_all(images.logits, num_active) > 0)
    return jax.lax.scan(add, need, clients)[0]


def count_right(gates: Array, answers: Array, images: Images) -> Array:
    """Images of each class that one mixture gets right.

    Args:
      gates: [B, E] float.
      answers: [B, E, L] float, each expert's class logits.
      images: the batch.

    Returns:
      [L] float.
    """
    mixed = jnp.einsum("be,bel->bl", gates, answers)
    right = (mixed.argmax(-1) == images.y).astype(jnp.float32)
    return right @ images.label


def score_routed(
    logits: Array, answers: Array, images: Images, num_active: int, every_expert: bool
) -> dict[str, Array]:
    """Counts of one gate over all experts: `global` [L], `routed` [E, L], `soft` [L].

    `soft` mixes every expert and is left out where not all are computed.
    """
    gates = route_all(logits, num_active)
    counts = {
        "global": count_right(gates, answers, images),
        "routed": jnp.einsum("be,bl->el", gates, images.label),
    }
    if every_expert:
        soft = jax.nn.softmax(logits, axis=-1)
        counts["soft"] = count_right(soft, answers, images)
    return counts


def score_experts(answers: Array, images: Images) -> dict[str, Array]:
    """Counts of every expert without a gate: `expert` [E, L]."""
    right = (answers.argmax(-1) == images.y[:, None]).astype(jnp.float32)
    return {"expert": jnp.einsum("be,bl->el", right, images.label)}


def answer_experts(head: PyTree, outputs: Array, program: Program) -> Array:
    """Every expert's class logits [B, E, L], or probabilities where they are mixed."""
    answers = program.model.parts.head(head, outputs)
    mixed = program.strategy.mix == "probabilities"
    return jax.nn.softmax(answers) if mixed else answers


def answer_personal(
    client: ClientView, images: Images, params: PyTree, program: Program
) -> tuple[Array, Array]:
    """Gate logits [B, E] and answers [B, E, L] of ONE client's own whole model."""
    num_experts = client.held.shape[0]
    everything = jnp.arange(num_experts)[None]
    parts, local = program.model.parts, program.strategy.local_experts
    own = take_submodel(params, client.personal, everything, local)
    features = parts.stem(own["stem"], images.batch, None)
    outputs = apply_experts(parts, own["experts"]["moe"], features, None)
    answers = answer_experts(own["head"], outputs, program)
    return gate_logits(own["gate"]["moe"], features), answers


def score_clients(
    clients: ClientView,
    answer: Callable[[ClientView], tuple[Array, Array]],
    images: Images,
    num_active: int,
    every_expert: bool,
) -> dict[str, Array]:
    """Counts [N, L] `personal`; with personal parts also those of the global questions.

    Args:
      clients: all clients [N].
      answer: ONE client -> its gate logits [B, E] and answers [B, E, L].
      images: the batch.
      num_active: A.
      every_expert: whether all experts have answered, so that more can be asked.
    """

    def ask(client: ClientView) -> dict[str, Array]:
        logits, answers = answer(client)
        gates = route(logits, client.held, num_active)
        counts = {"personal": count_right(gates, answers, images)}
        if client.personal:
            counts |= score_routed(logits, answers, images, num_active, every_expert)
            counts |= score_experts(answers, images) if every_expert else {}
        return counts

    return jax.lax.map(ask, clients)
