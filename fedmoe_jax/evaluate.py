"""Global, personal and per-expert accuracy, with every expert computed once per image.

Test images are dealt over the devices and walked in batches. From the gate logits
[B, E] and every expert's own class logits [B, E, L], each question is one more mixture:

* global: top-A of all E experts; also softly over all E.
* personal: each client's held experts, the test set weighted to its own label mix.
* expert: one expert alone.

Where gates are personal the server has none: global then means the average, over the
clients that have taken part, of the accuracy with the client's own gate over all E
experts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedmoe_jax.client import normalise
from fedmoe_jax.models import Model, apply_experts
from fedmoe_jax.routing import gate_logits, route
from fedmoe_jax.sharding import CLIENTS
from fedmoe_jax.types import Array, Federation, PyTree, SimState, Sizes

TEST_BATCH = 250


class Answers(NamedTuple):
    """What the stem and every expert alone say about one batch of test images.

    Attributes:
      features: [B, ...] float.
      expert_logits: [B, E, L] float.
      y: [B] int32 labels, -1 for padding.
      label: [B, L] float, one-hot labels, zero rows for padding.
    """

    features: Array
    expert_logits: Array
    y: Array
    label: Array


def answer(
    state: SimState, federation: Federation, x: Array, y: Array, *, model: Model
) -> Answers:
    """Runs stem, all E experts and head once on a batch [B, H, W, F] uint8."""
    images = normalise(x, federation.mean, federation.std)
    features = model.stem(state.params["stem"], images)
    outputs = apply_experts(model, state.params["experts"], features)  # [B, E, O]
    return Answers(
        features=features,
        expert_logits=model.head(state.params["head"], outputs),
        y=y,
        label=jax.nn.one_hot(y, federation.label_mix.shape[1]),
    )


def count_right(gates: Array, answers: Answers) -> Array:
    """[L] float, images of each class that the mixture `gates` [B, E] gets right."""
    mixed = jnp.einsum("be,bel->bl", gates, answers.expert_logits)
    right = (mixed.argmax(-1) == answers.y).astype(jnp.float32)
    return right @ answers.label


def ask_server(gate: PyTree, answers: Answers, num_active: int) -> dict[str, Array]:
    """Counts of one gate over all E experts: `global`, `soft` [L], `routed` [E, L]."""
    logits = gate_logits(gate, answers.features)
    routed = route(logits, jnp.ones(logits.shape[1], bool), num_active)
    return {
        "global": count_right(routed, answers),
        "soft": count_right(jax.nn.softmax(logits, axis=-1), answers),
        "routed": jnp.einsum("be,bl->el", routed, answers.label),
    }


def ask_client(gate: PyTree, held: Array, answers: Answers, num_active: int) -> Array:
    """[L] counts of ONE client that routes among its held experts, [E] bool."""
    logits = gate_logits(gate, answers.features)
    return count_right(route(logits, held, num_active), answers)


def deal_test_images(federation: Federation, devices: int) -> tuple[Array, Array]:
    """Test images and labels in equal batches: [G, b, H, W, F] and [G, b].

    G is a multiple of `devices`; padding has label -1 and counts nowhere.
    """
    count = federation.test_y.shape[0]
    batch = min(TEST_BATCH, -(-count // devices))
    padding = -count % (batch * devices)
    x = jnp.pad(federation.test_x, ((0, padding), (0, 0), (0, 0), (0, 0)))
    y = jnp.pad(federation.test_y, (0, padding), constant_values=-1)
    return x.reshape(-1, batch, *x.shape[1:]), y.reshape(-1, batch)


def count_batch(
    state: SimState,
    federation: Federation,
    x: Array,
    y: Array,
    *,
    model: Model,
    sizes: Sizes,
    personal_gate: bool,
) -> dict[str, Array]:
    """Correct predictions of one batch by label, for every question asked.

    Args:
      state: the simulation.
      federation: for the normalisation of images.
      x: [B, H, W, F] uint8.
      y: [B] int32, -1 for padding.
      model: the model.
      sizes: static sizes.
      personal_gate: whether each client has a gate of its own.

    Returns:
      `total` [L] images; `global`, `soft` [L], `expert` [E, L], `personal` [N, L]
      correct predictions; `routed` [E, L] gate mass. With personal gates `global`,
      `soft` and `routed` are averages over clients.
    """
    answers = answer(state, federation, x, y, model=model)
    active = sizes.num_active
    took_part = state.align.held.any(axis=1)  # [N]
    # A client that never took part holds nothing yet; it is left out afterwards.
    held = state.align.held | ~took_part[:, None]

    def ask(client) -> dict[str, Array]:
        gate, mask = client
        own = ask_server(gate, answers, active) if personal_gate else {}
        return own | {"personal": ask_client(gate, mask, answers, active)}

    if personal_gate:
        counts = jax.lax.map(ask, (state.personal_gate, held))
        share = took_part / jnp.maximum(took_part.sum(), 1.0)
        for name in ("global", "soft", "routed"):
            counts[name] = jnp.tensordot(share, counts[name], 1)
    else:
        gate = state.params["gate"]
        counts = jax.lax.map(lambda mask: ask((gate, mask)), held)
        counts |= ask_server(gate, answers, active)
    alone = answers.expert_logits.argmax(-1) == y[:, None]  # [B, E]
    counts["expert"] = jnp.einsum("be,bl->el", alone * 1.0, answers.label)
    return counts | {"total": answers.label.sum(0)}


def worst_decile(accuracy: Array, counted: Array) -> Array:
    """Mean of the worst tenth (rounded up) of the counted clients' accuracies.

    Args:
      accuracy: [N] float32.
      counted: [N] bool.

    Returns:
      [] float32, 0 when nobody counts.
    """
    number = jnp.ceil(0.1 * counted.sum())
    ordered = jnp.sort(jnp.where(counted, accuracy, jnp.inf))
    worst = jnp.where(jnp.arange(accuracy.shape[0]) < number, ordered, 0.0)
    return worst.sum() / jnp.maximum(number, 1)


def summarise_counts(
    counts: dict[str, Array], held: Array, label_mix: Array
) -> dict[str, Array]:
    """Accuracies in [0, 1] from counts over the whole test set.

    Args:
      counts: see `count_batch`.
      held: [N, E] bool; clients that hold nothing are left out of personal accuracy.
      label_mix: [N, L] float32, rows sum to 1.
    """
    total = counts["total"]  # [L]
    share = 1.0 / jnp.maximum(total, 1.0)
    client_accuracy = (counts["personal"] * share[None] * label_mix).sum(1)  # [N]
    took_part = held.any(axis=1)
    return {
        "global_accuracy": counts["global"].sum() / total.sum(),
        "global_soft_accuracy": counts["soft"].sum() / total.sum(),
        "personal_accuracy": jnp.where(took_part, client_accuracy, 0.0).sum()
        / jnp.maximum(took_part.sum(), 1),
        "worst_decile_accuracy": worst_decile(client_accuracy, took_part),
        "client_accuracy": client_accuracy,
        "expert_accuracy": counts["expert"].sum(1) / total.sum(),
        "specialisation": counts["routed"] * share[None],
    }


@functools.cache
def build_evaluate(
    *, model: Model, sizes: Sizes, gate_mode: str, mesh: Mesh
) -> Callable[[SimState, Federation], dict[str, Array]]:
    """Builds `evaluate(state, federation) -> accuracies`.

    The result holds `global_accuracy`, `global_soft_accuracy`, `personal_accuracy`,
    `worst_decile_accuracy` (all []), `client_accuracy` [N], `expert_accuracy` [E] and
    `specialisation` [E, L] (the share of each class's gate mass per expert).
    """

    def count_share(state, federation, x, y):
        def add_batch(total, batch):
            counts = count_batch(
                state,
                federation,
                *batch,
                model=model,
                sizes=sizes,
                personal_gate=gate_mode == "personal",
            )
            return jax.tree.map(jnp.add, total, counts), None

        experts, labels = sizes.num_experts, sizes.num_classes
        shapes = {
            "total": (labels,),
            "global": (labels,),
            "soft": (labels,),
            "routed": (experts, labels),
            "expert": (experts, labels),
            "personal": (sizes.num_clients, labels),
        }
        zero = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        counts, _ = jax.lax.scan(add_batch, zero, (x, y))
        return jax.lax.psum(counts, CLIENTS)

    count = jax.shard_map(
        count_share,
        mesh=mesh,
        in_specs=(P(), P(), P(CLIENTS), P(CLIENTS)),
        out_specs=P(),
        check_vma=False,
    )

    @jax.jit
    def evaluate(state: SimState, federation: Federation) -> dict[str, Array]:
        chex.assert_shape(state.align.held, (sizes.num_clients, sizes.num_experts))
        x, y = deal_test_images(federation, mesh.size)
        counts = count(state, federation, x, y)
        return summarise_counts(counts, state.align.held, federation.label_mix)

    return evaluate
