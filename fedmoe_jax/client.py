"""What one client does in one round: T local steps on the sub-model that it holds."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedmoe_jax.align.top_k import held_mask
from fedmoe_jax.loss import Seen, nothing_seen, see_batch, summarise_feedback
from fedmoe_jax.models.image_moe import Model, apply_experts
from fedmoe_jax.models.routing import (
    calibration_loss,
    gate_logits,
    load_loss,
    route,
    z_loss,
)
from fedmoe_jax.rules import Rules
from fedmoe_jax.types import Array, Federation, Feedback, Hyper, PyTree, Sizes
from fedmoe_jax.world.drift import distort
from fedmoe_jax.world.outcome import Conditions


@struct.dataclass
class ClientInput:
    """What the server sends to one client (a leading C axis in a round).

    Attributes:
      client: [] int32, client id.
      steps: [] int32, local steps to take; 0 for what only pads the cohort.
      budget: [] int32 >= 1, experts that the client has room to train.
      scale: [] float32, factor of its delta in the averages, 1 for most.
      held: [K] int32, ids of the held experts.
      slot: [K] bool, which of them count.
      calibration: [] float32 >= 0, factor of the calibration loss, 1 for most.
      correction: what control variates add to its gradients, like params; {} for none.
      own: the client's personal parts, by name like params; {} where there are none.
      distortion: [] float32, how far its images have drifted; None where none do.
      conditions: under which it works; read where its outcome is judged.
    """

    client: Array
    steps: Array
    budget: Array
    scale: Array
    held: Array
    slot: Array
    calibration: Array
    correction: PyTree
    own: PyTree
    distortion: Array | None = None
    conditions: Conditions | None = None


@struct.dataclass
class ClientUpdate:
    """What one client sends back.

    Attributes:
      delta: sub-model `{stem, gate [E, ...], experts [K, ...], head}`, what training
        added to what the server sent.
      feedback: per-slot feedback.
      loss: [] float32 nats, mean training loss (cross-entropy) over the steps.
      accuracy: [] float32 in [0, 1], mean training accuracy over the steps.
      finite: [] bool, whether every number of the update is finite.
    """

    delta: PyTree
    feedback: Feedback
    loss: Array
    accuracy: Array
    finite: Array


def client_optimizer(
    name: str, learning_rate: Array, momentum: float
) -> optax.GradientTransformation:
    """The local optimiser: `sgd` with momentum, or `adam`."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=momentum or None),
        "adam": lambda: optax.adam(learning_rate),
    }
    return table[name]()


def normalise(x: Array, mean: Array, std: Array) -> Array:
    """Images [B, H, W, F] -> float32 with zero mean and unit variance per F.

    Pixels are uint8, or floats in [0, 255].
    `mean` and `std` [H, W, F] are read like the images, so that the loop vectorises.
    """
    return (x.astype(jnp.float32) / 255.0 - mean[None]) / std[None]


def see(x: Array, distortion: Array | None, kind: str) -> Array:
    """Images [B, H, W, F] as a client sees them: distorted where images drift."""
    return distort(x.astype(jnp.float32), kind, distortion) if kind else x


def is_local(held: Array, num_experts: int, local_experts: int) -> Array:
    """Which of the held experts [K] never leave the client: the last ones of E."""
    return held >= num_experts - local_experts


def take_submodel(
    params: PyTree, own: PyTree, held: Array, local_experts: int
) -> PyTree:
    """One client's sub-model: stem, head, all gate rows, the held experts [K, ...].

    Args:
      params: the server's.
      own: the client's personal parts, instead of the server's.
      held: [K] int32, expert ids.
      local_experts: how many experts, the last ones, are the client's own.
    """
    parts = {part: own.get(part, params[part]) for part in ("stem", "gate", "head")}
    experts = jax.tree.map(lambda leaf: leaf[held], params["experts"])
    if "experts" in own:

        def choose(mine: Array, sent: Array) -> Array:
            local = is_local(held, mine.shape[0], local_experts)
            shape = local.shape + (1,) * (sent.ndim - 1)
            return jnp.where(local.reshape(shape), mine[held], sent)

        experts = jax.tree.map(choose, own["experts"], experts)
    return parts | {"experts": experts}


def draw_batches(key: Array, index: Array, size: Array, sizes: Sizes) -> Array:
    """Example ids of all local steps: passes over the client's examples, shuffled once.

    Args:
      key: the client's key.
      index: [M] int32, the client's examples, padded.
      size: [] int32 >= 1, how many of them count.
      sizes: static sizes.

    Returns:
      [T, B] int32 ids into the federation's arrays; padding is never drawn, and no
      example is drawn twice before all have been drawn once.
    """
    place = jnp.arange(index.shape[0])
    noise = jnp.where(place < size, jax.random.uniform(key, index.shape), jnp.inf)
    shuffled = index[jnp.argsort(noise)]
    draws = jnp.arange(sizes.local_steps * sizes.batch_size) % size
    return shuffled[draws].reshape(sizes.local_steps, sizes.batch_size)


def sum_gate_losses(logits: Array, inputs: ClientInput, hyper: Hyper) -> Array:
    """Calibration, load and z losses of gate logits [B, E], each with its weight."""
    mask = held_mask(inputs.held, inputs.slot, logits.shape[1])
    calibration = hyper.calibration * inputs.calibration
    return (
        calibration * calibration_loss(logits, mask)
        + hyper.load_loss * load_loss(logits, mask)
        + hyper.z_loss * z_loss(logits, mask)
    )


def freeze_others(
    outputs: Array, gates: Array, inputs: ClientInput, hyper: Hyper, rules: Rules
) -> Array:
    """Experts' outputs [B, K, O]; gradients pass the `budget` most valuable only."""
    value = jax.lax.stop_gradient(rules.focus(gates, hyper))
    rank = jnp.argsort(jnp.argsort(jnp.where(inputs.slot, -value, jnp.inf)))
    chosen = (rank < inputs.budget)[None, :, None]
    return jnp.where(chosen, outputs, jax.lax.stop_gradient(outputs))


def mix_outputs(model: Model, head: PyTree, outputs: Array, gates: Array) -> Array:
    """Logits [B, L] of the mixture of the experts' outputs [B, K, O]."""
    return model.head(head, jnp.einsum("bk,bko->bo", gates, outputs))


def mix_probabilities(
    model: Model, head: PyTree, outputs: Array, gates: Array
) -> Array:
    """Logits [B, L] of the mixture of the experts' own class probabilities."""
    answers = jax.nn.softmax(model.head(head, outputs))  # [B, K, L]
    return jnp.log(jnp.maximum(jnp.einsum("bk,bkl->bl", gates, answers), 1e-12))


def local_loss(
    submodel: PyTree,
    x: Array,
    y: Array,
    inputs: ClientInput,
    hyper: Hyper,
    key: Array,
    *,
    model: Model,
    sizes: Sizes,
    rules: Rules,
) -> tuple[Array, Seen]:
    """The objective of one local step.

    Cross-entropy and, where there is more than one expert, the losses of the gate.

    Args:
      submodel: params of one client.
      x: [B, H, W, F] float images.
      y: [B] int32 labels.
      inputs: the client's inputs.
      hyper: weights of the terms.
      key: of the step; dropout draws from it.
      model: the model.
      sizes: static sizes.
      rules: what the objective is.

    Returns:
      loss [], and what the batch adds to the feedback.
    """
    stem_key, expert_key = jax.random.split(key)
    frozen = {part: jax.lax.stop_gradient(submodel[part]) for part in rules.frozen}
    submodel = submodel | frozen
    features = model.stem(submodel["stem"], x, stem_key)
    gates, gate_loss = jnp.ones((x.shape[0], 1)), 0.0
    mass = jnp.ones(1) if rules.report_mass else jnp.ones(0)
    if sizes.num_experts > 1:  # a dense control has nothing to route
        logits = gate_logits(submodel["gate"], features)  # [B, E]
        gates = route(logits[:, inputs.held], inputs.slot, sizes.num_active)  # [B, K]
        gate_loss = rules.gate_loss(logits, inputs, hyper)
        if rules.report_mass:
            mass = jax.nn.softmax(logits).mean(0)
    outputs = apply_experts(model, submodel["experts"], features, expert_key)
    if rules.focus:
        outputs = freeze_others(outputs, gates, inputs, hyper, rules)
    mix = mix_probabilities if rules.probabilities else mix_outputs
    predictions = mix(model, submodel["head"], outputs, gates)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(predictions, y)
    correct = (predictions.argmax(-1) == y).astype(jnp.float32)
    loss = cross_entropy.mean() + gate_loss
    return loss, see_batch(cross_entropy, correct, gates, mass)


def add_prox(grads: PyTree, submodel: PyTree, received: PyTree, prox: Array) -> PyTree:
    """Adds the gradient of FedProx's `prox / 2 * |submodel - received|^2`.

    Written as a gradient, it fuses with the optimiser's pass over the params.
    """
    return jax.tree.map(lambda g, w, r: g + prox * (w - r), grads, submodel, received)


def step_weights(steps: Array, momentum: float) -> Array:
    """How often, in sum over its steps, a gradient of local SGD ends up in the delta.

    The gradient of a step is in the momentum of all later ones; without momentum each
    counts once. FedNova's |a|_1 (arXiv 2007.07481, section 4).

    Args:
      steps: [...] int32 or float32, local steps.
      momentum: in [0, 1).
    """
    steps = steps.astype(jnp.float32)
    if momentum == 0:
        return steps
    tail = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - tail) / (1 - momentum)


def all_finite(tree: PyTree) -> Array:
    """[] bool, whether every number of a pytree is finite."""
    return jnp.all(
        jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    )


def build_client_update(
    model: Model, sizes: Sizes, rules: Rules
) -> Callable[..., ClientUpdate]:
    """Builds `client_update(params, inputs, federation, hyper, key) -> ClientUpdate`.

    The returned function is written for ONE client; `key` is that client's key of the
    round. Cost and memory follow K, never E. Ragged clients take `inputs.steps` steps,
    others all T; a trip count known beforehand is faster on accelerators. Without
    `prox` a step does not read the received params, which would not fit in cache.
    """

    def client_update(
        params: PyTree,
        inputs: ClientInput,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> ClientUpdate:
        chex.assert_shape([inputs.held, inputs.slot], (sizes.max_held,))
        received = take_submodel(params, inputs.own, inputs.held, rules.local_experts)
        tx = client_optimizer(
            rules.client_optimizer, hyper.client_learning_rate, rules.momentum
        )
        draw_key, dropout_key = jax.random.split(key)
        batches = draw_batches(
            draw_key,
            federation.index[inputs.client],
            federation.size[inputs.client],
            sizes,
        )

        def local_step(step, carry):
            submodel, opt_state, seen = carry
            ids = batches[step]
            x = see(federation.x[ids], inputs.distortion, rules.world.images)
            x = normalise(x, federation.mean, federation.std)
            grads, seen_now = jax.grad(local_loss, has_aux=True)(
                submodel,
                x,
                federation.y[ids],
                inputs,
                hyper,
                jax.random.fold_in(dropout_key, step),
                model=model,
                sizes=sizes,
                rules=rules,
            )
            if rules.prox:
                grads = add_prox(grads, submodel, received, hyper.prox)
            if inputs.correction:
                grads = optax.tree.add(grads, inputs.correction)
            updates, opt_state = tx.update(grads, opt_state, submodel)
            submodel = optax.apply_updates(submodel, updates)
            return submodel, opt_state, jax.tree.map(jnp.add, seen, seen_now)

        steps = inputs.steps if rules.ragged else sizes.local_steps
        num_mass = sizes.num_experts if rules.report_mass else 0
        seen = nothing_seen(sizes.max_held, num_mass)
        start = received, tx.init(received), seen
        trained, _, seen = jax.lax.fori_loop(0, steps, local_step, start)
        delta = optax.tree.sub(trained, received)
        chex.assert_trees_all_equal_shapes(delta, received)
        examples = jnp.maximum(steps * sizes.batch_size, 1)
        return ClientUpdate(
            delta=delta,
            feedback=summarise_feedback(seen),
            loss=seen.total_loss / examples,
            accuracy=seen.total_right / examples,
            finite=all_finite(delta) & jnp.isfinite(seen.total_loss),
        )

    return client_update
