"""DP-FedAvg on sub-models (McMahan et al., arXiv 1710.06963): clip, sum, add noise.

A client's whole update, of stem, gate, held experts and head as far as they travel, is
scaled to an L2 norm of at most `privacy.clip` C. Clients weigh alike, whatever the
config and the strategy say of weights: examples that a client owns are private. Every
sum gets Gaussian noise of standard deviation z C, `privacy.noise` times C, before the
server divides it: the mean of an expert with m_e holders has noise z C / m_e, so that
rare experts get the worst. Paper and formula are for one model that all clients train;
dividing each part by its own number of clients is this project's choice.

Assumption: the number of holders of each expert in a round, by which sums are divided,
is public, or assignment is private itself. What clients keep, their personal parts, is
made of the update as it was. The server is trusted with single updates, or sees sums
alone (secure aggregation), and with control variates, which get no noise.
"""

import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.base import Strategy
from fedmoe_jax.models.submodel import held_mask, is_local
from fedmoe_jax.moe_layers import map_layers, map_rows
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Feedback,
    Hyper,
    PyTree,
)


def weigh_alike(
    weights: dict[str, Array], inputs: ClientInput, hyper: Hyper, strategy: Strategy
) -> dict[str, Array]:
    """The weights of ONE client with 1 for all that counts.

    Every expert that it holds and that does not stay with it counts, one that it has
    trained on no position, too: how many hold an expert is public, and how many use it
    is not. Of the gate the rows count that would with any use of the held experts.

    Args:
      weights: see `aggregate.weigh`.
      inputs: of the client.
      hyper: hyperparameters.
      strategy: gives the weights of the gate's rows, and what stays with the client.
    """
    num_experts = weights["gate"].shape[1]
    local = is_local(inputs.held, num_experts, strategy.local_experts)
    busy = inputs.steps > 0

    def count_rows(held: Array, slot: Array) -> Array:
        used = Feedback(*[jnp.ones(held.shape)] * 7)
        mask = held_mask(held, slot, num_experts)
        return strategy.gate_weight(mask, used, jnp.int32(1), hyper) > 0

    over_layers = map_layers(count_rows, inputs.held.shape[0], in_axes=0)
    gate = (
        over_layers(inputs.held, inputs.slot) & busy & ("gate" not in strategy.personal)
    )
    counted = {part: weight > 0 for part, weight in weights.items()}
    counted |= {"gate": gate, "experts": inputs.slot & ~local & busy}
    return jax.tree.map(lambda each: each.astype(jnp.float32), counted)


def leave_out(delta: PyTree, weights: dict[str, Array]) -> PyTree:
    """ONE client's delta with zeros for what does not count in the averages.

    Args:
      delta: leaves [E, ...] of gates and [K, ...] of experts.
      weights: of its parts, see `aggregate.weigh`, 0 or 1.
    """

    def keep(weight: Array, leaf: Array) -> Array:
        counted = (weight > 0).reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim))
        return jnp.where(counted, leaf, 0.0)  # NaN of what does not count, too

    return map_rows(keep, weights, delta)


def clip_update(
    update: ClientUpdate,
    inputs: ClientInput,
    weights: dict[str, Array],
    hyper: Hyper,
) -> ClientUpdate:
    """ONE client's update with a delta of bounded norm.

    Args:
      update: the client's result.
      inputs: gives the factor of the delta in the sums, which is part of the norm.
      weights: of its parts, 0 or 1; what does not count is no part of the norm.
      hyper: gives `privacy.clip`.
    """
    delta = leave_out(update.delta, weights)
    norm = jnp.abs(inputs.scale) * optax.tree.norm(delta)
    factor = hyper.privacy.clip / jnp.maximum(norm, hyper.privacy.clip)
    return update.replace(delta=optax.tree.scale(factor, delta))
