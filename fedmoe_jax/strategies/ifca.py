"""IFCA (arXiv 2006.04088): each client trains the one expert of least loss on its data.

From the published description (algorithm 1, with averages of models). Every client of a
round receives all experts, runs each of them on a batch of its own, and trains the best
alone, so that each expert is the model of a cluster of clients. As with the paper's
sharing of weights the clusters have stem, gate and head in common. Chosen here: the
loss is that of one batch (`probe`) instead of all of a client's examples; averages
weigh clients by their examples; experts of equal loss, such as the copies that a dense
warm-up leaves, are chosen by lot, each client for itself, as they would be one cluster
for ever otherwise. A gate is no part of IFCA: with a single expert it gets no gradient
from the task, and learns from the calibration loss alone which expert clients choose.

Of several MoE layers a client chooses an expert in each, with the others as received.
Where layers are tied (`model.tied`) it is one choice for the whole model, as in the
paper.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.align.ties import first_by_lot
from fedmoe_jax.align.top_k import give_all_slots, hold_all
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Hyper
from fedmoe_jax.world.costs import ROUNDING


def choose_best(probe: Array, slot: Array, hyper: Hyper, key: Array) -> Array:
    """The valid slot of least loss, of equals by lot: [K] bool, true in one place.

    Losses are equal that differ by no more than float32 rounds sums; NaN is the worst.

    Args:
      probe: [K] float32 nats.
      slot: [K] bool, the valid slots, one at least.
      hyper: not read.
      key: a JAX key, consumed.
    """
    loss = jnp.where(slot & ~jnp.isnan(probe), probe, jnp.inf)
    least = loss.min()
    best = slot & (loss <= least + ROUNDING * jnp.abs(least))
    lots = jax.random.uniform(key, slot.shape)
    return jnp.arange(len(slot)) == first_by_lot(best, lots)


def activate_one(config: ConfigDict) -> ConfigDict:
    """A slot for every expert, of which one answers."""
    config.num_active = 1
    return give_all_slots(config)


IFCA = Strategy(
    about=(
        "Sends every client all experts; it trains the one of least loss on its own "
        "data, as it finds by a probe of each."
    ),
    assign=hold_all,
    needs="all experts down and probed on every client, whatever its capacity",
    configure=activate_one,
    choose=choose_best,
)
