"""One client's round: T local steps on the sub-model that it holds."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.base import Routing
from fedmoe_jax.loss import (
    FeedbackSums,
    mean_report,
    sum_batch,
    summarise_feedback,
    zero_sums,
)
from fedmoe_jax.models.image_moe import Model, apply_experts
from fedmoe_jax.models.routing import gate_logits, route
from fedmoe_jax.models.submodel import held_mask, take_submodel
from fedmoe_jax.optimizers import add_prox, client_optimizer
from fedmoe_jax.program import Program
from fedmoe_jax.tasks.images import normalise, see
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Federation,
    Hyper,
    PyTree,
    Sizes,
)


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


def freeze_others(outputs: Array, value: Array, inputs: ClientInput) -> Array:
    """Experts' outputs [B, K, O]; gradients pass the `budget` of highest value [K]."""
    value = jax.lax.stop_gradient(value)
    rank = jnp.argsort(jnp.argsort(jnp.where(inputs.slot[0], -value, jnp.inf)))
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
    program: Program,
) -> tuple[Array, FeedbackSums]:
    """The objective of one local step.

    Cross-entropy and, where there is more than one expert, the losses of the gate.

    Args:
      submodel: params of one client.
      x: [B, H, W, F] float images.
      y: [B] int32 labels.
      inputs: the client's inputs.
      hyper: weights of the terms.
      key: of the step; dropout draws from it.
      program: the model, and the strategy that shapes the objective.

    Returns:
      loss [], and the feedback of the batch.
    """
    model, strategy, sizes = program.model, program.strategy, program.sizes
    stem_key, expert_key = jax.random.split(key)
    frozen = {part: jax.lax.stop_gradient(submodel[part]) for part in strategy.frozen}
    submodel = submodel | frozen
    features = model.stem(submodel["stem"], x, stem_key)
    gates, gate_loss, report = jnp.ones((x.shape[0], 1)), 0.0, None
    if sizes.num_experts > 1:  # a dense control has nothing to route
        logits = gate_logits(submodel["gate"]["moe"], features)  # [B, E]
        gates = route(
            logits[:, inputs.held[0]], inputs.slot[0], sizes.num_active
        )  # [B, K]
        held = held_mask(inputs.held[0], inputs.slot[0], sizes.num_experts)
        gate_loss = strategy.gate_loss(logits, held, inputs.calibration[0], hyper)
        if strategy.report:
            report = strategy.report(Routing(logits, gates), {"x": x, "y": y}, hyper)
    outputs = apply_experts(model, submodel["experts"]["moe"], features, expert_key)
    if strategy.expert_priority:
        value = strategy.expert_priority(gates, hyper)
        outputs = freeze_others(outputs, value, inputs)
    mix = mix_probabilities if strategy.mix == "probabilities" else mix_outputs
    predictions = mix(model, submodel["head"], outputs, gates)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(predictions, y)
    correct = (predictions.argmax(-1) == y).astype(jnp.float32)
    loss = cross_entropy.mean() + gate_loss
    return loss, sum_batch(cross_entropy, correct, gates, report)


def report_shapes(hyper: Hyper, program: Program) -> PyTree:
    """Shapes of the strategy's report on a batch; None without one."""
    sizes, strategy = program.sizes, program.strategy
    if strategy.report is None or sizes.num_experts == 1:
        return None
    shape = lambda width: jax.ShapeDtypeStruct((sizes.batch_size, width), jnp.float32)
    routing = Routing(shape(sizes.num_experts), shape(sizes.max_held))
    return jax.eval_shape(lambda r: strategy.report(r, {}, hyper), routing)


def all_finite(tree: PyTree) -> Array:
    """[] bool, whether every number of a pytree is finite."""
    return jnp.all(
        jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    )


def build_client_update(program: Program) -> Callable[..., ClientUpdate]:
    """Builds `client_update(params, inputs, federation, hyper, key) -> ClientUpdate`.

    The returned function is written for ONE client; `key` is that client's key of the
    round. Cost and memory follow K, never E. Ragged clients take `inputs.steps` steps,
    others all T; a trip count known beforehand is faster on accelerators. Without
    `static.prox` a step does not read the received params, which would not fit in
    cache.
    """
    sizes, static, strategy = program.sizes, program.static, program.strategy

    def client_update(
        params: PyTree,
        inputs: ClientInput,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> ClientUpdate:
        chex.assert_shape([inputs.held, inputs.slot], (1, sizes.max_held))
        received = take_submodel(
            params, inputs.personal, inputs.held, strategy.local_experts
        )
        tx = client_optimizer(
            static.client.optimizer, hyper.client.learning_rate, static.client.momentum
        )
        draw_key, dropout_key = jax.random.split(key)
        client = inputs.client
        batches = draw_batches(
            draw_key, federation.index[client], federation.size[client], sizes
        )

        def local_step(step, carry):
            submodel, opt_state, sums = carry
            ids = batches[step]
            x = see(federation.x[ids], inputs.distortion, static.drift.images)
            x = normalise(x, federation.mean, federation.std)
            grads, batch_sums = jax.grad(local_loss, has_aux=True)(
                submodel,
                x,
                federation.y[ids],
                inputs,
                hyper,
                jax.random.fold_in(dropout_key, step),
                program=program,
            )
            if static.prox:
                grads = add_prox(grads, submodel, received, hyper.client.prox)
            if inputs.correction:
                grads = optax.tree.add(grads, inputs.correction)
            updates, opt_state = tx.update(grads, opt_state, submodel)
            submodel = optax.apply_updates(submodel, updates)
            return submodel, opt_state, jax.tree.map(jnp.add, sums, batch_sums)

        steps = inputs.steps if static.ragged else sizes.local_steps
        sums = zero_sums(sizes.max_held, report_shapes(hyper, program))
        start = received, tx.init(received), sums
        trained, _, sums = jax.lax.fori_loop(0, steps, local_step, start)
        delta = optax.tree.sub(trained, received)
        chex.assert_trees_all_equal_shapes(delta, received)
        examples = jnp.maximum(steps * sizes.batch_size, 1)
        return ClientUpdate(
            delta=delta,
            feedback=jax.tree.map(lambda x: x[None], summarise_feedback(sums)),
            report=jax.tree.map(lambda x: x[None], mean_report(sums)),
            loss=sums.total_loss / examples,
            accuracy=sums.total_right / examples,
            finite=all_finite(delta) & jnp.isfinite(sums.total_loss),
        )

    return client_update
