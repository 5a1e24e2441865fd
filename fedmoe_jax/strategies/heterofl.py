"""HeteroFL (arXiv 2010.01264): nested widths of one dense network.

From the published description. The network is as wide as all K slots of the largest
client; one of k_c slots trains the first k_c / K of its hidden units, and each unit is
averaged over those that trained it. Here experts are the slices of the hidden layer:
client c holds slices 0 to k_c - 1, all of them answer every example, and their outputs
are added, scaled by K / k_c (the paper's scaler). Changed here: stem and head are whole
on every client, as in all systems, so only the layer of the experts is nested (a shared
expert is whole, too, and outside the scaler); each
slice has an output bias and, in convolutional experts, a normalisation of its own;
there is no batch statistic to keep, and no masked cross-entropy.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.align.top_k import fill_slots
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds the first k_c slices."""
    slot = fill_slots(evidence.capacity, sizes.max_held)
    slices = jnp.arange(sizes.max_held, dtype=jnp.int32)
    return Assignment(jnp.broadcast_to(slices, slot.shape), slot)


def no_loss(
    logits: Array, weight: Array | None, held: Array, factor: Array, hyper: Hyper
) -> Array:
    """Nothing: there is no gate to train."""
    return jnp.zeros(())


def configure(config: ConfigDict) -> ConfigDict:
    """As many slices as the largest client has slots, all of them active."""
    config.num_experts = config.num_active = config.max_held
    return config


HETEROFL = Strategy(
    about=(
        "Every client trains the first hidden units of one dense network, as many as "
        "it has room for."
    ),
    assign=assign,
    # The outputs of a dense expert are its hidden units, which the head would share.
    allowed=(("model.expert", ("mlp", "conv")), ("gate.mode", ("global",))),
    configure=configure,
    gate_loss=no_loss,
    gating="sum",
)
