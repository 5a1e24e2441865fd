"""One client's round: T local steps on the sub-model that it holds."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.loss import local_loss, mean_report, summarise_feedback, zero_sums
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
        slots = sizes.num_layers, sizes.max_held
        chex.assert_shape([inputs.held, inputs.slot], slots)
        received = take_submodel(
            params, inputs.personal, inputs.held, strategy.local_experts
        )
        tx = client_optimizer(static.client, hyper.client.learning_rate)
        draw_key, dropout_key = jax.random.split(key)
        batches, probed = draw_local(inputs, federation, hyper, draw_key, sizes)
        keep = {}
        if inputs.masks is not None:
            keep = keep_params(inputs.masks, received, program.units)
            received = multiply_parts(received, keep)
        probe = None
        if probed is not None:
            probe = probe_experts(received, inputs, federation, probed, program)
        if strategy.choose is not None:
            assert probe is not None  # `static.probes` is on
            slot = inputs.slot, hyper, draw_key, strategy.choose
            inputs = inputs.replace(slot=choose_slots(probe, *slot))
        augment_key = jax.random.fold_in(draw_key, AUGMENT)

        def local_step(step, carry):
            submodel, opt_state, sums, importance = carry
            ids = batches[step]
            batch = take_batch(
                federation.train,
                ids,
                federation.statistics,
                program.task,
                static.drift.images,
                inputs.distortion,
                bind_augment(program, jax.random.fold_in(augment_key, step)),
            )
            grads, batch_sums = jax.grad(local_loss, has_aux=True)(
                submodel,
                federation.fixed,
                batch,
                inputs,
                hyper,
                jax.random.fold_in(dropout_key, step),
                program=program,
            )
            grads = multiply_parts(grads, keep)
            if importance:
                taylor = measure_taylor(submodel, grads, program.units)
                importance = jax.tree.map(jnp.add, importance, taylor)
            if static.prox:
                grads = add_prox(grads, submodel, received, hyper.client.prox)
            if inputs.correction:
                grads = optax.tree.add(grads, multiply_parts(inputs.correction, keep))
            updates, opt_state = tx.update(grads, opt_state, submodel)
            submodel = optax.apply_updates(submodel, updates)
            sums = jax.tree.map(jnp.add, sums, batch_sums)
            return submodel, opt_state, sums, importance

        steps = inputs.steps if static.ragged else sizes.local_steps
        unknown = {}
        if keep and static.pruning.kind in MEASURED:
            unknown = zero_units(received, program.units)
        start = received, tx.init(received), zero_sums(hyper, program), unknown
        trained, _, sums, found = jax.lax.fori_loop(0, steps, local_step, start)
        delta = optax.tree.sub(trained, received)
        chex.assert_trees_all_equal_shapes(delta, received)
        weight = sums.weight
        if weight is None:
            weight = jnp.maximum(steps * program.scores.loss.size, 1)
        return ClientUpdate(
            delta=delta,
            feedback=summarise_feedback(sums).replace(probe=probe),
            report=mean_report(sums),
            loss=sums.total_loss / weight,
            accuracy=sums.total_score / weight,
            finite=all_finite(delta) & jnp.isfinite(sums.total_loss),
            chosen=None if strategy.choose is None else inputs.slot,
            keep=keep,
            importance=jax.tree.map(lambda leaf: leaf / jnp.maximum(steps, 1), found),
        )

    return client_update
