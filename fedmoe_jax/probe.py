"""The probe: how well each received expert serves a client before it trains.

A client runs the sub-model that it has received forward on one batch, once for each of
its experts, which is then the only one of its MoE layer. The batch may be of examples
that the client never trains on, `fitness.probe_share` of its own. IFCA (arXiv
2006.04088, section 3) does so with every model of the server, all of which it sends to
every client, and so does the strategy `ifca`; others probe what they hold anyway.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Route
from fedmoe_jax.positions import mean_loss
from fedmoe_jax.program import Program
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import Array, ClientInput, Federation, PyTree

HOLD_OUT = 2**32 - 6  # purpose, folded into the run's key as the numbers of rounds are


def count_held_out(size: Any, share: Any) -> Any:
    """Examples that a client holds out of its training, at least 1 and not all.

    Args:
      size: [] or [N] int32 >= 1, NumPy or JAX, examples that it owns.
      share: [] in [0, 0.5]; 0 holds out none.

    Returns:
      int32, `share * size` rounded, in [1, size - 1]; 0 where `share` or `size - 1` is.
    """
    near = (size.astype("float32") * share + 0.5).astype("int32")
    return near.clip(1, None).clip(None, size - 1) * (share > 0)


def find_hold_key(run_key: Array, client: Array) -> Array:
    """The key with which ONE client [] chooses the examples that it holds out."""
    return jax.random.fold_in(jax.random.fold_in(run_key, HOLD_OUT), client)


def hold_out(key: Array, index: Array, size: Array, share: Array) -> Array:
    """The examples that ONE client holds out of its training: [M] bool.

    Each of its examples has a random number of its own, and the smallest are held out:
    the same in every round while the client owns the same examples. Where labels drift,
    what it takes over may take the place of what it has held out so far.

    Args:
      key: of the client's choice, the same in every round.
      index: [M] int32, the client's examples, padded.
      size: [] int32 >= 1, how many of them count.
      share: [] float32 in [0, 0.5], see `count_held_out`.
    """
    draw = lambda example: jax.random.uniform(jax.random.fold_in(key, example))
    owned = jnp.arange(index.shape[0]) < size
    noise = jnp.where(owned, jax.vmap(draw)(index), jnp.inf)
    rank = jnp.argsort(jnp.argsort(noise))
    return rank < count_held_out(size, share)


def leave_alone(slot: Array) -> Array:
    """The slots with one alone in its layer, once for each: [G, K, G, K] bool.

    Args:
      slot: [G, K] bool; the other layers keep theirs.
    """
    num_layers, places = slot.shape
    here = jnp.eye(num_layers, dtype=bool)[:, None, :, None]
    alone = jnp.eye(places, dtype=bool)[None, :, None, :]
    return jnp.where(here, alone, slot[None, None])


def probe_experts(
    submodel: PyTree,
    inputs: ClientInput,
    federation: Federation,
    ids: Array,
    program: Program,
) -> Array:
    """Losses of ONE client's received sub-model with each of its experts alone.

    Nothing is dropped at random, and no expert is chosen to be trained. No more memory
    is needed than by a local step: passes of a model with parts are vmapped, which runs
    stem and experts once for all of them; those of others follow one another.

    Args:
      submodel: as received, without the parts that are frozen.
      inputs: of the client.
      federation: its examples.
      ids: [B] int32, the examples of the probe.
      program: the task, the model, and the strategy that mixes the experts.

    Returns:
      [G, K] float32 nats, the mean over the positions of the batch; of an invalid slot
      that of the expert that fills it.
    """
    strategy, drift = program.strategy, program.static.drift.images
    rows = federation.train, ids, federation.statistics
    batch = take_batch(*rows, program.task, drift, inputs.distortion)
    frozen = {part: federation.frozen[part] for part in strategy.frozen}
    num_active = program.sizes.num_active
    route = Route(num_active, strategy.mix, gating=strategy.gating, bias=inputs.bias)

    def probe(slot: Array) -> Array:
        model = submodel | frozen, federation.fixed, batch, inputs.held, slot
        outputs, _ = program.model.apply(*model, route, None)
        return mean_loss(program.task.loss(outputs, batch))

    masks = leave_alone(inputs.slot).reshape(-1, *inputs.slot.shape)
    over_slots = jax.vmap(probe) if program.model.parts else partial(jax.lax.map, probe)
    return over_slots(masks).reshape(inputs.slot.shape)
