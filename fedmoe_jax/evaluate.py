"""Global, personal and per-expert accuracy from one pass over the test images.

Test images are dealt over the devices and walked in batches. From the gate logits
[B, E] and the experts' own class logits [B, E, L], each question is one more mixture
(see `questions`):

* global: top-A of all E experts; also softly over all E.
* personal: each client's held experts, the test set weighted to its own label mix.
* expert: one expert alone.

The soft and the expert question need every expert of every image. Without them only
the pairs of image and expert that some gate chooses are computed (see `dispatch`).

Where the gate or more is personal the server has none: global then means the average,
over the clients that have taken part, of the accuracy with the client's own gate over
all E experts.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.models.dispatch import dispatch
from fedmoe_jax.models.image_moe import apply_experts
from fedmoe_jax.models.routing import gate_logits
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import CLIENTS, spread
from fedmoe_jax.scoring import (
    Images,
    answer_experts,
    answer_personal,
    find_needed,
    own_logits,
    score_clients,
    score_experts,
    score_routed,
    view_clients,
)
from fedmoe_jax.tasks.images import normalise, see
from fedmoe_jax.types import Array, Federation, Hyper, SimState
from fedmoe_jax.world.step import View, observe

TEST_BATCH = 500


def divide_images(count: int, most: int, num_devices: int) -> tuple[int, int]:
    """Batches of each device and images in each; arguments as in `schedule_images`."""
    batches = -(-count // (num_devices * most))
    return batches, -(-count // (num_devices * batches))


def schedule_images(count: int, most: int, device: Array, num_devices: int) -> Array:
    """Positions in the test set of one device's batches, equally many on each.

    Args:
      count: X', images of the test set.
      most: the largest batch allowed.
      device: [] int32, this device among `num_devices`.
      num_devices: devices that share the test set.

    Returns:
      [G, B] int32; positions from X' on are padding.
    """
    batches, size = divide_images(count, most, num_devices)
    share = jnp.arange(batches * size).reshape(batches, size)
    return device * batches * size + share


def encode_batch(
    state: SimState,
    federation: Federation,
    position: Array,
    distortion: Array | None,
    *,
    program: Program,
) -> Images:
    """Takes the images at `position` [B] and runs the stem and the server's gate."""
    count = federation.test_y.shape[0]
    index = jnp.minimum(position, count - 1)
    x = see(federation.test_x[index], distortion, program.static.drift.images)
    x = normalise(x, federation.mean, federation.std)
    y = jnp.where(position < count, federation.test_y[index], -1)
    features = program.model.stem(state.params["stem"], x, None)
    logits = None
    if not program.strategy.personal:
        logits = gate_logits(state.params["gate"]["moe"], features)
    return Images(
        x=x,
        features=features,
        logits=logits,
        y=y,
        label=jax.nn.one_hot(y, federation.label_mix.shape[1]),
    )


def average_clients(counts: dict[str, Array], took_part: Array) -> dict[str, Array]:
    """Averages every count [N, ...] but `personal` over clients that took part [N]."""
    share = took_part / jnp.maximum(took_part.sum(), 1.0)
    average = lambda name, count: (
        count if name == "personal" else jnp.tensordot(share, count, 1)
    )
    return {name: average(name, count) for name, count in counts.items()}


def count_batch(
    state: SimState,
    view: View,
    position: Array,
    *,
    program: Program,
) -> dict[str, Array]:
    """The counts of `count_images`; where images drift, each client's of what it sees.

    Then there is also `drifted` [L], what the global model gets right of images that
    have drifted.
    """
    counts = count_images(state, view.federation, position, None, program=program)
    if view.distortion is None:
        return counts
    amount = view.distortion.max()
    drifted = count_images(state, view.federation, position, amount, program=program)
    drifts = view.distortion > 0
    personal = jnp.where(drifts[:, None], drifted["personal"], counts["personal"])
    return counts | {"personal": personal, "drifted": drifted["global"]}


def count_images(
    state: SimState,
    federation: Federation,
    position: Array,
    distortion: Array | None,
    *,
    program: Program,
) -> dict[str, Array]:
    """Correct predictions of one batch by label, for every question asked.

    Args:
      state: the simulation.
      federation: holds the test set.
      position: [B] int32 positions in the test set, see `schedule_images`.
      distortion: [] float32, how far the images have drifted; None for not.
      program: the model; its strategy says which parts are personal, whether all
        experts are computed, for `soft` and `expert` too, and how they are mixed.

    Returns:
      `total` [L] images; `global`, `soft` [L], `expert` [E, L], `personal` [N, L]
      correct predictions; `routed` [E, L] gate mass. Without `every_expert`, `personal`
      holds only for labels that the client has.
    """
    model, strategy, sizes = program.model, program.strategy, program.sizes
    personal, every_expert = strategy.personal, strategy.every_expert
    images = encode_batch(state, federation, position, distortion, program=program)
    clients, active = view_clients(state, federation), sizes.num_active
    active = strategy.test_active or active
    if set(personal) - {"gate"}:
        answer = lambda client: answer_personal(client, images, state.params, program)
    else:
        if every_expert:
            experts = state.params["experts"]["moe"]
            outputs = apply_experts(model, experts, images.features, None)
            answers = answer_experts(state.params["head"], outputs, program)
        else:
            need = find_needed(images, clients, active)
            answers = dispatch(model, state.params, images.features, need, sizes)
            if strategy.mix == "probabilities":
                answers = jax.nn.softmax(answers)
        answer = lambda client: (own_logits(client, images), answers)
    counts = score_clients(clients, answer, images, active, every_expert)
    if personal:
        counts = average_clients(counts, find_participants(state))
    else:
        counts |= score_routed(images.logits, answers, images, active, every_expert)
        counts |= score_experts(answers, images) if every_expert else {}
    return counts | {"total": images.label.sum(0)}


def find_participants(state: SimState) -> Array:
    """[N] bool, clients that hold experts and of which an update has counted."""
    return state.align.held.any(axis=(1, 2)) & (state.participation.rounds > 0)


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
    counts: dict[str, Array], took_part: Array, label_mix: Array
) -> dict[str, Array]:
    """Accuracies in [0, 1] from counts over the whole test set.

    Args:
      counts: see `count_batch`; the rows of all clients are alike where the data are
        pooled, and there is one of them only.
      took_part: [N] bool, likewise; who is in personal accuracy.
      label_mix: [N, L] float32, rows sum to 1.
    """
    total = counts["total"]  # [L]
    share = 1.0 / jnp.maximum(total, 1.0)
    client_accuracy = (counts["personal"] * share[None] * label_mix).sum(1)  # [N]
    took_part = jnp.broadcast_to(took_part, client_accuracy.shape)
    accuracies = {
        "global_accuracy": counts["global"].sum() / total.sum(),
        "personal_accuracy": jnp.where(took_part, client_accuracy, 0.0).sum()
        / jnp.maximum(took_part.sum(), 1),
        "worst_decile_accuracy": worst_decile(client_accuracy, took_part),
        "client_accuracy": client_accuracy,
        "specialisation": counts["routed"] * share[None],
    }
    if "drifted" in counts:
        accuracies["drifted_accuracy"] = counts["drifted"].sum() / total.sum()
    if "soft" in counts:
        accuracies["global_soft_accuracy"] = counts["soft"].sum() / total.sum()
        accuracies["expert_accuracy"] = counts["expert"].sum(1) / total.sum()
    return accuracies


def build_evaluate_share(
    program: Program,
) -> Callable[[SimState, Federation, Hyper], dict[str, Array]]:
    """Builds `evaluate_share(state, federation, hyper) -> accuracies`, to be spread.

    It is written for one device: it counts its share of the test images and joins the
    devices of the mesh axis `clients`. The result is the same on all of them.

    Args:
      program: as in `count_images`; with `every_expert` there are also
        `global_soft_accuracy` and `expert_accuracy`.

    Returns:
      A function whose result holds `global_accuracy`, `personal_accuracy`,
      `worst_decile_accuracy` (all []), `client_accuracy` [N] and `specialisation`
      [E, L] (the share of each class's gate mass per expert); where images drift
      `drifted_accuracy` [], the global one on drifted images; with `every_expert` also
      `global_soft_accuracy` [] and `expert_accuracy` [E].
    """
    one_batch = functools.partial(count_batch, program=program)

    def evaluate_share(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> dict[str, Array]:
        sizes = program.sizes
        shape = sizes.num_clients, sizes.num_layers, sizes.num_experts
        chex.assert_shape(state.align.held, shape)
        view = observe(state.world, federation, hyper, program.processes)
        federation = view.federation
        device, num_devices = jax.lax.axis_index(CLIENTS), jax.lax.axis_size(CLIENTS)
        count = federation.test_y.shape[0]
        position = schedule_images(count, TEST_BATCH, device, num_devices)

        def add(total: dict[str, Array], batch: Array) -> tuple[dict[str, Array], None]:
            counts = one_batch(state, view, batch)
            return jax.tree.map(jnp.add, total, counts), None

        shapes = jax.eval_shape(one_batch, state, view, position[0])
        zero = jax.tree.map(jnp.zeros_like, shapes)
        counts = jax.lax.psum(jax.lax.scan(add, zero, position)[0], CLIENTS)
        return summarise_counts(counts, find_participants(state), federation.label_mix)

    return evaluate_share


@functools.cache
def build_evaluate(
    program: Program,
) -> Callable[[SimState, Federation, Hyper], dict[str, Array]]:
    """Compiles `build_evaluate_share` for one run on all devices of the mesh."""
    return jax.jit(spread(build_evaluate_share(program), program.mesh))
