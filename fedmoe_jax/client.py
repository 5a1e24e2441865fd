"""What one client does in one round: T local steps on the sub-model that it holds."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedmoe_jax.align.solve import held_mask
from fedmoe_jax.models import Model, apply_experts
from fedmoe_jax.routing import calibration_loss, gate_logits, load_loss, route, z_loss
from fedmoe_jax.types import Array, Federation, Feedback, Hyper, PyTree, Sizes


@struct.dataclass
class ClientTask:
    """What the server sends to one client (a leading C axis in a round).

    Attributes:
      client: [] int32, client id.
      valid: [] bool, false for slots that only pad the cohort.
      held: [K] int32, ids of the held experts.
      slot: [K] bool, which of them count.
      gate: gate params with leading E axis, the server's or the client's own.
    """

    client: Array
    valid: Array
    held: Array
    slot: Array
    gate: PyTree


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
    """uint8 images [B, H, W, F] -> float32 with zero mean and unit variance per F."""
    scaled = x.astype(jnp.float32) / 255.0
    return (scaled - mean[None, None, None]) / std[None, None, None]


def take_submodel(params: PyTree, gate: PyTree, held: Array) -> PyTree:
    """One client's sub-model: stem, head, all gate rows, the held experts [K, ...]."""
    experts = jax.tree.map(lambda leaf: leaf[held], params["experts"])
    return {
        "stem": params["stem"],
        "gate": gate,
        "experts": experts,
        "head": params["head"],
    }


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


def local_loss(
    submodel: PyTree,
    x: Array,
    y: Array,
    task: ClientTask,
    hyper: Hyper,
    *,
    model: Model,
    sizes: Sizes,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """The objective of one local step.

    Cross-entropy + calibration, load and z losses, each with its weight.

    Args:
      submodel: params of one client.
      x: [B, H, W, F] float images.
      y: [B] int32 labels.
      task: the client's task.
      hyper: weights of the terms.
      model: the model.
      sizes: static sizes.

    Returns:
      loss [], and (cross-entropy [B], correct [B] float, gates [B, K]).
    """
    features = model.stem(submodel["stem"], x)
    logits = gate_logits(submodel["gate"], features)  # [B, E]
    gates = route(logits[:, task.held], task.slot, sizes.num_active)  # [B, K]
    outputs = apply_experts(model, submodel["experts"], features)  # [B, K, O]
    mixed = jnp.einsum("bk,bko->bo", gates, outputs)
    predictions = model.head(submodel["head"], mixed)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(predictions, y)
    mask = held_mask(task.held, task.slot, logits.shape[1])
    loss = (
        cross_entropy.mean()
        + hyper.calibration * calibration_loss(logits, mask)
        + hyper.load_loss * load_loss(logits, mask)
        + hyper.z_loss * z_loss(logits, mask)
    )
    correct = (predictions.argmax(-1) == y).astype(jnp.float32)
    return loss, (cross_entropy, correct, gates)


def add_prox(grads: PyTree, submodel: PyTree, received: PyTree, prox: Array) -> PyTree:
    """Adds the gradient of FedProx's `prox / 2 * |submodel - received|^2`.

    Written as a gradient, it fuses with the optimiser's pass over the params.
    """
    return jax.tree.map(lambda g, w, r: g + prox * (w - r), grads, submodel, received)


def summarise_feedback(cross_entropy: Array, correct: Array, gates: Array) -> Feedback:
    """Per-slot feedback from everything a client saw in a round.

    An example counts for an expert with its gate, so that with A = 1 `accuracy` is the
    accuracy on the examples routed to the expert, and experts that share every example
    can still differ.

    Args:
      cross_entropy: [T, B] cross-entropy, nats.
      correct: [T, B] 1 where the prediction was right.
      gates: [T, B, K].
    """
    mass = gates.sum((0, 1))  # [K]
    share = 1.0 / jnp.maximum(mass, 1e-6)
    return Feedback(
        accuracy=jnp.einsum("tbk,tb->k", gates, correct) * share,
        loss=jnp.einsum("tbk,tb->k", gates, cross_entropy) * share,
        frequency=mass / jnp.maximum(mass.sum(), 1e-6),
        load=(gates > 0).sum((0, 1)).astype(jnp.float32),
    )


def all_finite(tree: PyTree) -> Array:
    """[] bool, whether every number of a pytree is finite."""
    return jnp.all(
        jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    )


def build_client_update(
    *, model: Model, sizes: Sizes, optimizer: str, momentum: float
) -> Callable[..., ClientUpdate]:
    """Builds `client_update(params, task, federation, hyper, key) -> ClientUpdate`.

    The returned function is written for ONE client; `key` is that client's key of the
    round. Cost and memory follow K, never E.
    """

    def client_update(
        params: PyTree,
        task: ClientTask,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> ClientUpdate:
        chex.assert_shape([task.held, task.slot], (sizes.max_held,))
        received = take_submodel(params, task.gate, task.held)
        tx = client_optimizer(optimizer, hyper.client_learning_rate, momentum)

        def local_step(carry, ids):
            submodel, opt_state = carry
            x = normalise(federation.x[ids], federation.mean, federation.std)
            grads, seen = jax.grad(local_loss, has_aux=True)(
                submodel, x, federation.y[ids], task, hyper, model=model, sizes=sizes
            )
            grads = add_prox(grads, submodel, received, hyper.prox)
            updates, opt_state = tx.update(grads, opt_state, submodel)
            return (optax.apply_updates(submodel, updates), opt_state), seen

        batches = draw_batches(
            key, federation.index[task.client], federation.size[task.client], sizes
        )
        (trained, _), (cross_entropy, correct, gates) = jax.lax.scan(
            local_step, (received, tx.init(received)), batches
        )
        delta = optax.tree.sub(trained, received)
        chex.assert_trees_all_equal_shapes(delta, received)
        return ClientUpdate(
            delta=delta,
            feedback=summarise_feedback(cross_entropy, correct, gates),
            loss=cross_entropy.mean(),
            accuracy=correct.mean(),
            finite=all_finite(delta) & jnp.isfinite(cross_entropy).all(),
        )

    return client_update
