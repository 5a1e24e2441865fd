"""What the gates are asked about one batch of test images, and which pairs they need.

* global: the top-A of all E experts; also softly over all E.
* personal: the top-A of each client's held experts.

Where gates are personal the server has none, and each client's own gate is asked the
global questions as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.routing import gate_logits, route
from fedmoe_jax.types import Array, Federation, PyTree, SimState


class Images(NamedTuple):
    """One batch of test images as gates see it.

    Attributes:
      features: [B, ...] float, output of the stem.
      logits: [B, E] float of the server's gate, None where gates are personal.
      y: [B] int32 labels, -1 for padding.
      label: [B, L] float, one-hot labels, zero rows for padding.
    """

    features: Array
    logits: Array | None
    y: Array
    label: Array


class Asker(NamedTuple):
    """ONE client that is asked (a leading N axis for all of them).

    Attributes:
      gate: the client's own gate, None where the server's serves all.
      held: [E] bool, the experts it routes among.
      wanted: [L] float, 1 for labels that the client has, else 0.
    """

    gate: PyTree
    held: Array
    wanted: Array


def list_askers(state: SimState, federation: Federation, personal_gate: bool) -> Asker:
    """All clients [N]; one that never took part holds nothing and may use all."""
    held = state.align.held
    return Asker(
        gate=state.personal_gate if personal_gate else None,
        held=held | ~held.any(axis=1, keepdims=True),
        wanted=(federation.label_mix > 0).astype(jnp.float32),
    )


def own_logits(asker: Asker, images: Images) -> Array:
    """[B, E] gate logits of ONE client: the server's, unless gates are personal."""
    if asker.gate is None:
        return images.logits
    return gate_logits(asker.gate, images.features)


def route_all(logits: Array, num_active: int) -> Array:
    """[B, E] gates of the top-A of all experts."""
    return route(logits, jnp.ones(logits.shape[1], bool), num_active)


def find_needed(images: Images, askers: Asker, num_active: int) -> Array:
    """Pairs that the server, or a client that has the image's label, routes to.

    Args:
      images: one batch.
      askers: all clients [N].
      num_active: A.

    Returns:
      [B, E] bool, false for padding.
    """
    real = images.y[:, None] >= 0

    def add(need: Array, asker: Asker) -> tuple[Array, None]:
        logits = own_logits(asker, images)
        wanted = (images.label @ asker.wanted)[:, None] > 0
        need |= wanted & (route(logits, asker.held, num_active) > 0)
        if asker.gate is not None:
            need |= real & (route_all(logits, num_active) > 0)
        return need, None

    if images.logits is None:
        need = jnp.zeros((images.y.shape[0], askers.held.shape[1]), bool)
    else:
        need = real & (route_all(images.logits, num_active) > 0)
    return jax.lax.scan(add, need, askers)[0]


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


def ask_gate(
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


def ask_alone(answers: Array, images: Images) -> dict[str, Array]:
    """Counts of every expert without a gate: `expert` [E, L]."""
    right = (answers.argmax(-1) == images.y[:, None]).astype(jnp.float32)
    return {"expert": jnp.einsum("be,bl->el", right, images.label)}


def ask_clients(
    askers: Asker, answers: Array, images: Images, num_active: int, every_expert: bool
) -> dict[str, Array]:
    """Counts [N, L] `personal`; with own gates also those of the global questions."""

    def ask(asker: Asker) -> dict[str, Array]:
        logits = own_logits(asker, images)
        gates = route(logits, asker.held, num_active)
        counts = {"personal": count_right(gates, answers, images)}
        if asker.gate is not None:
            counts |= ask_gate(logits, answers, images, num_active, every_expert)
        return counts

    return jax.lax.map(ask, askers)
