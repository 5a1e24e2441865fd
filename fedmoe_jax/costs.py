"""What a client's round costs: bytes on the wire, FLOPs, and seconds on its device.

Two sets of costs are kept apart. `count_costs` counts the simulated model, and these
bytes are reported. `scale_costs` makes the costs of the larger model that it stands
for, and these are what the devices feel.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, Devices, PyTree

# Training holds the parameters, their gradients, the momentum, and activations that
# are taken to be about as large as the parameters.
TRAINING_COPIES = 4

# The backward pass forms gradients of inputs and of parameters, each about as much
# work as the forward pass.
TRAINING_PASSES = 3

# Accuracy, loss, frequency and load of one held expert, as float32.
FEEDBACK_BYTES = 16


class Costs(NamedTuple):
    """The costs of a model's parts, as Python floats: integers overflow int32 in JAX.

    Attributes:
      shared_bytes: stem and head.
      gate_bytes: all E rows of the gate.
      expert_bytes: one expert.
      shared_flops: stem, gate and head, forward and backward of one example.
      expert_flops: one expert, forward and backward of one example.
    """

    shared_bytes: float
    gate_bytes: float
    expert_bytes: float
    shared_flops: float
    expert_flops: float


def count_bytes(tree: PyTree) -> float:
    """Bytes of all leaves, arrays or their shapes; a JAX key counts as 8."""
    return float(
        sum(
            math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)
            for leaf in jax.tree.leaves(tree)
        )
    )


def count_costs(params: PyTree, forward_shared: float, forward_expert: float) -> Costs:
    """The costs of the simulated model.

    Args:
      params: `{"stem", "gate", "experts", "head"}`, arrays or their shapes.
      forward_shared: FLOPs of stem, gate and head, forward, one example.
      forward_expert: FLOPs of one expert, forward, one example.
    """
    num_experts = jax.tree.leaves(params["experts"])[0].shape[0]
    return Costs(
        shared_bytes=count_bytes((params["stem"], params["head"])),
        gate_bytes=count_bytes(params["gate"]),
        expert_bytes=count_bytes(params["experts"]) / num_experts,
        shared_flops=float(TRAINING_PASSES * forward_shared),
        expert_flops=float(TRAINING_PASSES * forward_expert),
    )


def scale_costs(costs: Costs, scale: float) -> Costs:
    """The costs of a model `scale` > 0 times as large in every part."""
    return Costs(*(float(scale * cost) for cost in costs))


def client_bytes(
    costs: Costs, slots: Array, *, personal_gate: bool
) -> tuple[Array, Array]:
    """Bytes that each client sends and receives in one round.

    Both ways go stem, head and the held experts, and the whole gate unless clients
    keep their own. Upwards goes the feedback as well.

    Args:
      costs: of the model that travels.
      slots: [C] int32, experts each client holds.
      personal_gate: whether gates stay with the clients.

    Returns:
      `(up, down)`, each [C] float32 bytes. Not int32, which ends at 2 GiB; float32
      rounds beyond 16 MiB, by less than one part in ten million.
    """
    chex.assert_rank(slots, 1)
    slots = slots.astype(jnp.float32)
    always = costs.shared_bytes + (0 if personal_gate else costs.gate_bytes)
    down = always + costs.expert_bytes * slots
    return down + FEEDBACK_BYTES * slots, down


def client_flops(costs: Costs, slots: Array, examples: Array) -> Array:
    """FLOPs of each client's local training.

    Every held expert is counted for every example. That is what training without
    sparse dispatch does, and the most that routing can ask for.

    Args:
      costs: of the model that is trained.
      slots: [C] int32, experts each client holds.
      examples: [] or [C] float32, examples each client trains, repeats included.

    Returns:
      [C] float32.
    """
    chex.assert_rank(slots, 1)
    per_example = costs.shared_flops + costs.expert_flops * slots.astype(jnp.float32)
    return per_example * examples


def client_seconds(
    devices: Devices,
    costs: Costs,
    slots: Array,
    examples: Array,
    *,
    personal_gate: bool,
) -> Array:
    """Seconds that each client needs for one round: download, training, upload.

    Args:
      devices: rows [C] of the cohort.
      costs: scaled, what the devices feel.
      slots: [C] int32, experts each client holds.
      examples: [] or [C] float32, examples each client trains, repeats included.
      personal_gate: whether gates stay with the clients.

    Returns:
      [C] float32, one part after the other, without overlap.
    """
    chex.assert_equal_shape([devices.flops, slots])
    up, down = client_bytes(costs, slots, personal_gate=personal_gate)
    training = client_flops(costs, slots, examples) / devices.flops
    return down / devices.download + training + up / devices.upload
