"""Groups of clients, whose strata are apart: classes, groups, and who is assigned what.

See `data.groups`. The L strata are those of group 0, of group 1 and so on, of one class
each. Only the oracle and evaluation read a client's group.
"""

import jax.numpy as jnp
from jax.scipy.special import xlogy

from fedmoe_jax.types import Array


def mix_classes(label_mix: Array, num_groups: int) -> Array:
    """The classes [n, L / Q] of clients with such strata [n, L], over all groups."""
    if num_groups == 1:
        return label_mix
    return label_mix.reshape(len(label_mix), num_groups, -1).sum(axis=1)


def mix_groups(label_mix: Array, num_groups: int) -> Array:
    """The groups [n, Q] of clients with such strata [n, L], over all classes."""
    return label_mix.reshape(len(label_mix), num_groups, -1).sum(axis=2)


def measure_information(held: Array, group_mix: Array) -> Array:
    """Mutual information of the clients' groups and the experts that they hold.

    Of a client drawn at random among those that hold any, and an expert drawn among
    those that it holds; the mean over layers.

    Args:
      held: [n, G, E] bool.
      group_mix: [n, Q] float32, rows sum to 1.

    Returns:
      [] float32, bits, 0 to log2(min(Q, E)).
    """
    held = held / jnp.maximum(held.sum(axis=2, keepdims=True), 1)
    joint = jnp.einsum("nq,nge->gqe", group_mix, held)
    joint /= jnp.maximum(joint.sum(axis=(1, 2), keepdims=True), 1e-9)
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=2, keepdims=True)
    nats = xlogy(joint, joint) - xlogy(joint, apart)
    return jnp.maximum(nats.sum(axis=(1, 2)).mean() / jnp.log(2.0), 0.0)
