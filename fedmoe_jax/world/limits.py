"""The number of experts that a device can hold."""

from typing import Any

import chex
import jax.numpy as jnp

from fedmoe_jax.types import Array, Devices
from fedmoe_jax.world.costs import (
    ROUNDING,
    TRAINING_COPIES,
    TRAINING_PASSES,
    Costs,
)


def limit_probes(experts: Array, probed: Array, costs: Costs, trained: Any) -> Array:
    """Experts that a client can train in the time in which it could without probes.

    A probe is one pass forward for every one of the k experts of each of the G MoE
    layers, through what all share, that expert, and all k experts of the other layers:
    `k + r k (s + ((G - 1) k + 1) / G) = experts`, s the FLOPs shared over those of an
    expert in every layer, r those of an expert for `probed` over those of training one.
    It is a square in k, and linear for G = 1.

    Args:
      experts: [N] float32, without probes; 0 or less gives 0.
      probed: [] or [N] float32 > 0, examples run forward for each expert of a layer,
        over the examples that are trained on.
      costs: of the model.
      trained: FLOPs of training an expert with one example.
    """
    layers, forward = costs.num_layers, costs.expert_flops / TRAINING_PASSES
    rate = probed * forward / trained
    linear = 1 + rate * (costs.shared_flops / costs.expert_flops + 1 / layers)
    square, aim = rate * (layers - 1) / layers, jnp.maximum(experts, 0.0)
    # 2 c / (b + root) has no difference of large numbers.
    return 2 * aim / (linear + jnp.sqrt(linear**2 + 4 * square * aim))


def find_room(
    devices: Devices,
    costs: Costs,
    *,
    buffer: Array,
    examples: Array,
    deadline: float,
    communication_share: float,
    probed: int,
    spread: Array | float = 1.0,
    saving: float = 1.0,
) -> Array:
    """The experts that each device has room for: the least of three limits.

    Stem, gate and head are paid for first; what is left is divided by the cost of one
    expert. Memory: `TRAINING_COPIES` of the parameters must fit, one of those that are
    frozen. Network: what is trained, down and up within `communication_share` of the
    deadline. Compute: every held expert on every example within the other part of it,
    what is frozen without a backward pass and what is fixed without gradients of its
    weights, after k probes, see `limit_probes`. The
    fixed split avoids a limit that depends on the other. A resource that just suffices
    for k experts gives k.

    Args:
      devices: leaves [N].
      costs: scaled, what the devices feel.
      buffer: [] float32 in [0, 1), share of every resource kept in reserve.
      examples: [] or [N] float32, examples a client trains in a round, > 0.
      deadline: seconds a round may take, > 0.
      communication_share: share in (0, 1) of the deadline for the network.
      probed: examples that a client runs forward for each expert of a layer that it
        holds, 0 for none.
      spread: experts that it holds, and probes whole, for each that it has room for.
      saving: share of an expert's FLOPs that go with the share of it that is kept; the
        rest is in each of those that it holds.

    Returns:
      [N] float32, whole experts and a part of one; below 0 where less than what all
      share fits.
    """
    chex.assert_equal_shape([devices.memory, devices.flops, devices.upload])
    usable = (1 + ROUNDING) * (1 - buffer)
    shared_bytes = costs.stem_bytes + costs.head_bytes + costs.gate_bytes
    copies = (usable * devices.memory - costs.frozen_bytes) / TRAINING_COPIES
    by_memory = (copies - shared_bytes) / costs.expert_bytes
    seconds_per_byte = (1 / devices.download + 1 / devices.upload) / usable
    travelling = communication_share * deadline - 2 * devices.latency
    travelling = travelling / seconds_per_byte
    by_network = (travelling - shared_bytes) / costs.expert_bytes
    work = (1 - communication_share) * deadline * usable * devices.flops / examples
    trained = costs.expert_flops * (saving + spread * (1 - saving))
    trained = trained - spread * costs.fixed_expert_flops
    left = work - costs.shared_training_flops
    if probed and not costs.expert_flops:  # a single expert's are among the shared ones
        left -= probed / examples * costs.shared_flops / TRAINING_PASSES
    by_compute = left / trained
    if probed and costs.expert_flops:
        by_compute = limit_probes(
            by_compute, spread * probed / examples, costs, trained
        )
    return jnp.minimum(jnp.minimum(by_memory, by_network), by_compute)


def true_capacity(
    devices: Devices, costs: Costs, *, max_capacity: int, **work: Any
) -> Array:
    """The number of whole experts that each device can hold: [N] int32 in [0, K].

    Args:
      devices: leaves [N].
      costs: scaled, what the devices feel.
      max_capacity: K, the most experts that any client has room for.
      **work: see `find_room`.
    """
    room = find_room(devices, costs, **work)
    return jnp.clip(jnp.floor(room), 0, max_capacity).astype(jnp.int32)
