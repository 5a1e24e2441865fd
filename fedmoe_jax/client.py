"""One client's round: T local steps on the sub-model that it holds."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.loss import (
    FeedbackSums,
    local_loss,
    mean_report,
    summarise_feedback,
    zero_sums,
)
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.moe_layers import layer_keys, map_layers
from fedmoe_jax.optimizers import add_prox, client_optimizer
from fedmoe_jax.probe import hold_out, probe_experts
from fedmoe_jax.program import Program
from fedmoe_jax.pruning.importance import measure_taylor
from fedmoe_jax.pruning.scores import MEASURED
from fedmoe_jax.pruning.units import keep_params, multiply_parts, zero_units
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Federation,
    Hyper,
    PyTree,
    Sizes,
)

# Purposes, folded into the key of a client's draws.
PROBE, CHOICE, AUGMENT = 1500, 1501, 1502


def draw_examples(
    key: Array, index: Array, counted: Array, size: Array, number: int
) -> Array:
    """Passes over some of a client's examples, shuffled once: [number] int32 ids.

    Args:
      key: consumed.
      index: [M] int32, the client's examples, padded.
      counted: [M] bool, those that are drawn.
      size: [] int32 >= 1, how many these are.
      number: of draws.
    """
    noise = jnp.where(counted, jax.random.uniform(key, index.shape), jnp.inf)
    shuffled = index[jnp.argsort(noise)]
    return shuffled[jnp.arange(number) % size]


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
    owned = jnp.arange(index.shape[0]) < size
    number = sizes.local_steps * sizes.batch_size
    drawn = draw_examples(key, index, owned, size, number)
    return drawn.reshape(sizes.local_steps, sizes.batch_size)


def draw_apart(
    key: Array, index: Array, size: Array, held_out: Array, sizes: Sizes
) -> tuple[Array, Array]:
    """Example ids of all local steps, and of a probe of the examples held out.

    Args:
      key: the client's key.
      index: [M] int32, the client's examples, padded.
      size: [] int32 >= 1, how many of them count.
      held_out: [M] bool, fewer than `size` of these. Where it is none, the probe is
        drawn from the examples that are trained on, which are then those of
        `draw_batches`.
      sizes: static sizes.

    Returns:
      [T, B] and [B] int32, both as passes over what they are drawn from.
    """
    owned, count = jnp.arange(index.shape[0]) < size, held_out.sum()
    number, some = sizes.local_steps * sizes.batch_size, count > 0
    trained = draw_examples(key, index, owned & ~held_out, size - count, number)
    probed = jnp.where(some, held_out, owned), jnp.where(some, count, size)
    probe_key = jax.random.fold_in(key, PROBE)
    probe = draw_examples(probe_key, index, *probed, sizes.batch_size)
    return trained.reshape(sizes.local_steps, sizes.batch_size), probe


def draw_local(
    inputs: ClientInput, federation: Federation, hyper: Hyper, key: Array, sizes: Sizes
) -> tuple[Array, Array | None]:
    """Example ids of ONE client's local steps [T, B], and of its probe [B] or None."""
    own = federation.index[inputs.client], federation.size[inputs.client]
    if inputs.hold_key is None:
        return draw_batches(key, *own, sizes), None
    held_out = hold_out(inputs.hold_key, *own, hyper.fitness.probe_share)
    return draw_apart(key, *own, held_out, sizes)


def choose_slots(
    probe: Array, slot: Array, hyper: Hyper, key: Array, choose: Callable[..., Array]
) -> Array:
    """The slots that ONE client trains, of those that it has received: [G, K] bool.

    Args:
      probe: [G, K] float32, the loss of each expert.
      slot: [G, K] bool, the valid slots.
      hyper: hyperparameters.
      key: of the client's draws, not consumed.
      choose: see `Strategy.choose`.
    """

    def choose_layer(probe: Array, slot: Array, key: Array) -> Array:
        chosen = choose(probe, slot, hyper, key)
        chex.assert_equal_shape([chosen, slot])
        return chosen & slot

    keys = layer_keys(jax.random.fold_in(key, CHOICE), len(slot))
    return map_layers(choose_layer, len(slot), in_axes=0)(probe, slot, keys)


def all_finite(tree: PyTree) -> Array:
    """[] bool, whether every number of a pytree is finite."""
    return jnp.all(
        jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    )


def bind_augment(program: Program, key: Array) -> Callable[[PyTree], PyTree] | None:
    """rows -> rows, as one step changes them; None where none does.

    Args:
      program: the task, and `client.augment`.
      key: of the step, consumed.
    """
    augment = dict(program.task.augments).get(program.static.client.augment)
    return None if augment is None else lambda rows: augment(rows, key)


class Start(NamedTuple):
    """What ONE client trains from.

    Attributes:
      inputs: what the server has sent, with the slots that the client trains.
      submodel: as received, of pruned experts what the client keeps.
      keep: factors of the parts that are pruned, see `pruning.units.keep_params`; {}
        where nothing is.
      batches: [T, B] int32, example ids of the local steps.
      probe: [G, K] float32, the loss of each expert on examples held out, before the
        first step; None where none are.
      augment_key: into which a step folds its number, to change its examples.
      dropout_key: likewise, to drop features.
    """

    inputs: ClientInput
    submodel: PyTree
    keep: PyTree
    batches: Array
    probe: Array | None
    augment_key: Array
    dropout_key: Array


class Progress(NamedTuple):
    """What ONE client has after some local steps.

    Attributes:
      submodel: as trained so far.
      opt_state: of its optimiser.
      sums: over the steps, of losses and feedback.
      importance: likewise, of the units; {} where it is not measured.
      first_loss: [] float32, mean of `Scores.loss` in the first batch, 0 before it;
        None without `static.fairness.power`.
    """

    submodel: PyTree
    opt_state: PyTree
    sums: FeedbackSums
    importance: PyTree
    first_loss: Array | None


def receive(
    params: PyTree,
    inputs: ClientInput,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    program: Program,
) -> Start:
    """The sub-model that ONE client has received, and what it draws for its round.

    Args:
      params: the server's.
      inputs: what the server has sent.
      federation: data and sizes.
      hyper: hyperparameters.
      key: the client's of the round, consumed.
      program: the static parts.
    """
    strategy = program.strategy
    held = inputs.personal, inputs.held
    submodel = take_submodel(params, *held, strategy.local_experts)
    draw_key, dropout_key = jax.random.split(key)
    batches, probed = draw_local(inputs, federation, hyper, draw_key, program.sizes)
    keep = {}
    if inputs.masks is not None:
        keep = keep_params(inputs.masks, submodel, program.units)
        submodel = multiply_parts(submodel, keep)
    probe = None
    if probed is not None:
        probe = probe_experts(submodel, inputs, federation, probed, program)
    if strategy.choose is not None:
        assert probe is not None  # `static.probes` is on
        slot = inputs.slot, hyper, draw_key, strategy.choose
        inputs = inputs.replace(slot=choose_slots(probe, *slot))
    augment_key = jax.random.fold_in(draw_key, AUGMENT)
    return Start(inputs, submodel, keep, batches, probe, augment_key, dropout_key)


def local_step(
    step: Array,
    progress: Progress,
    *,
    start: Start,
    federation: Federation,
    hyper: Hyper,
    tx: optax.GradientTransformation,
    program: Program,
) -> Progress:
    """One step of ONE client on a batch.

    Without `static.prox` it does not read the received sub-model, which would not fit
    in cache.

    Args:
      step: [] int32 in [0, T).
      progress: before the step.
      start: what the client trains from.
      federation: data.
      hyper: hyperparameters.
      tx: the client's optimiser.
      program: the static parts.
    """
    static, inputs, keep = program.static, start.inputs, start.keep
    submodel, opt_state, sums, importance, first_loss = progress
    batch = take_batch(
        federation.train,
        start.batches[step],
        federation.statistics,
        program.task,
        static.drift.images,
        inputs.distortion,
        bind_augment(program, jax.random.fold_in(start.augment_key, step)),
    )
    grads, batch_sums = jax.grad(local_loss, has_aux=True)(
        submodel,
        federation.fixed,
        batch,
        inputs,
        hyper,
        jax.random.fold_in(start.dropout_key, step),
        program=program,
    )
    grads = multiply_parts(grads, keep)
    if importance:
        taylor = measure_taylor(submodel, grads, program.units)
        importance = jax.tree.map(jnp.add, importance, taylor)
    if static.prox:
        grads = add_prox(grads, submodel, start.submodel, hyper.client.prox)
    if inputs.correction:
        grads = optax.tree.add(grads, multiply_parts(inputs.correction, keep))
    updates, opt_state = tx.update(grads, opt_state, submodel)
    submodel = optax.apply_updates(submodel, updates)
    sums = jax.tree.map(jnp.add, sums, batch_sums)
    if first_loss is not None:
        loss = batch_sums.total_loss / count_weight(batch_sums, 1, program)
        first_loss = jnp.where(step == 0, loss, first_loss)
    return Progress(submodel, opt_state, sums, importance, first_loss)


def count_weight(sums: FeedbackSums, steps: Array | int, program: Program) -> Array:
    """[], what sums over some steps are divided by: positions, or their weights.

    Args:
      sums: of the losses and scores of all positions.
      steps: [] int32, or an int, over how many steps.
      program: the static parts.
    """
    if sums.weight is not None:
        return jnp.maximum(sums.weight, 1e-6)
    return jnp.maximum(steps * program.scores.loss.size, 1)


def summarise(
    start: Start, trained: Progress, steps: Array | int, program: Program
) -> ClientUpdate:
    """The update of ONE client.

    Args:
      start: what it trained from.
      trained: after its last step.
      steps: [] int32, or an int, how many it took; 0 of a client that idled.
      program: the static parts.
    """
    delta = optax.tree.sub(trained.submodel, start.submodel)
    chex.assert_trees_all_equal_shapes(delta, start.submodel)
    sums, choose = trained.sums, program.strategy.choose
    weight = count_weight(sums, steps, program)
    mean = lambda leaf: leaf / jnp.maximum(steps, 1)
    return ClientUpdate(
        delta=delta,
        feedback=summarise_feedback(sums).replace(probe=start.probe),
        report=mean_report(sums),
        loss=sums.total_loss / weight,
        accuracy=sums.total_score / weight,
        finite=all_finite(delta) & jnp.isfinite(sums.total_loss),
        chosen=None if choose is None else start.inputs.slot,
        keep=start.keep,
        importance=jax.tree.map(mean, trained.importance),
        first_loss=trained.first_loss,
    )


def client_update(
    params: PyTree,
    inputs: ClientInput,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    program: Program,
) -> ClientUpdate:
    """The round of ONE client: T local steps on the sub-model that it holds.

    Cost and memory follow K, never E. Ragged clients take `inputs.steps` steps, others
    all T; a trip count known beforehand is faster on accelerators.

    Args:
      params: the server's.
      inputs: what the server has sent.
      federation: data and sizes.
      hyper: hyperparameters.
      key: the client's of the round, consumed.
      program: the static parts.
    """
    sizes, static = program.sizes, program.static
    chex.assert_shape([inputs.held, inputs.slot], (sizes.num_layers, sizes.max_held))
    start = receive(params, inputs, federation, hyper, key, program)
    tx = client_optimizer(static.client, hyper.client.learning_rate)
    step = functools.partial(
        local_step,
        start=start,
        federation=federation,
        hyper=hyper,
        tx=tx,
        program=program,
    )
    importance = {}
    if start.keep and static.pruning.kind in MEASURED:
        importance = zero_units(start.submodel, program.units)
    opt_state, sums = tx.init(start.submodel), zero_sums(hyper, program)
    first_loss = jnp.zeros(()) if static.fairness.power else None
    untrained = Progress(start.submodel, opt_state, sums, importance, first_loss)
    steps = start.inputs.steps if static.ragged else sizes.local_steps
    trained = jax.lax.fori_loop(0, steps, step, untrained)
    return summarise(start, trained, steps, program)


def build_client_update(program: Program) -> Callable[..., ClientUpdate]:
    """Builds `client_update(params, inputs, federation, hyper, key) -> ClientUpdate`.

    The returned function is written for ONE client; `key` is that client's key of the
    round.
    """
    return functools.partial(client_update, program=program)
