"""The costs of a client's round: bytes on the wire, FLOPs, and seconds on its device.

Two sets of costs are kept apart. `count_costs` counts the simulated model, and these
bytes are reported. `scale_costs` makes the costs of the larger model that it stands
for, and these are what the devices feel.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.base import GATE_STEM, PARTS, SHARED_EXPERT, Strategy
from fedmoe_jax.types import Array, Devices, PyTree

# Training holds the parameters, their gradients, the momentum, and activations that
# are taken to be about as large as the parameters.
TRAINING_COPIES = 4

# The backward pass forms gradients of inputs and of parameters, each about as much
# work as the forward pass.
TRAINING_PASSES = 3
BACKWARD = (TRAINING_PASSES - 1) / TRAINING_PASSES  # share of what has a backward pass

NUMBER_BYTES = 4  # of a float32

# Share by which a resource may fall short, as its float32 does where it just suffices.
ROUNDING = 1e-6
# Accuracy, loss, frequency, load and peak of one held expert. Where clients probe, the
# loss of the probe is one more.
FEEDBACK_NUMBERS = 5


class Costs(NamedTuple):
    """The costs of a model's parts, as Python floats: integers overflow int32 in JAX.

    Attributes:
      stem_bytes: the stem, where it is trained.
      head_bytes: the head, where it is trained.
      gate_bytes: all E rows of the gates of all MoE layers.
      expert_bytes: one expert in every MoE layer.
      frozen_bytes: what is not trained.
      shared_flops: all but the experts, forward and backward of one example.
      expert_flops: one expert in every MoE layer, likewise.
      frozen_flops: the share of `shared_flops` of parts that have no backward pass
        where they are frozen.
      fixed_flops: the share of `shared_flops` for gradients of weights that the model
        itself keeps fixed, which training does not need.
      fixed_expert_flops: likewise of `expert_flops`.
      dense_flops: stem, one expert in every MoE layer and head, forward and backward of
        one example, as where the server trains them alone.
      travel_bytes: the stem, gate and head, but for those that stay with the clients.
      copies: 2 where control variates travel beside the model, else 1; no cost.
      num_layers: G, MoE layers of the model; no cost.
    """

    stem_bytes: float
    head_bytes: float
    gate_bytes: float
    expert_bytes: float
    frozen_bytes: float
    shared_flops: float
    expert_flops: float
    frozen_flops: float
    fixed_flops: float
    fixed_expert_flops: float
    dense_flops: float
    travel_bytes: float
    copies: int
    num_layers: int

    @property
    def shared_bytes(self) -> float:
        """All but gates and experts, frozen or not."""
        return self.stem_bytes + self.head_bytes + self.frozen_bytes

    @property
    def shared_training_flops(self) -> float:
        """All but the experts, as far as training needs it."""
        return self.shared_flops - BACKWARD * self.frozen_flops - self.fixed_flops

    @property
    def expert_training_flops(self) -> float:
        """One expert that is trained in every MoE layer, likewise."""
        return self.expert_flops - self.fixed_expert_flops


def count_bytes(tree: PyTree) -> float:
    """Bytes of all leaves, arrays or their shapes; a JAX key counts as 8."""
    return float(
        sum(
            math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)
            for leaf in jax.tree.leaves(tree)
        )
    )


def count_costs(
    params: PyTree,
    frozen: PyTree,
    forward: dict[str, float],
    strategy: Strategy,
    fixed: tuple[float, float] = (0.0, 0.0),
) -> Costs:
    """The costs of the simulated model.

    Args:
      params: the parts that are trained, see `base.Model`, arrays or their shapes.
      frozen: what is not, see `Federation.frozen`.
      forward: FLOPs of the parts, see `flops.count_forward_flops`. A part that is
        frozen has no backward pass, nor has a shared expert with a frozen stem. A
        frozen stem of the gate is run beside the one that is trained.
      strategy: of a program, decides which parts travel and how often.
      fixed: FLOPs forward with what the model itself keeps fixed, see
        `products.count_fixed_products`. Gradients pass it, and it has none itself.
    """
    num_experts = jax.tree.leaves(params["experts"])[0].shape[0]
    dense = sum(flops for part, flops in forward.items() if part != "gate")
    shared = {part: flops for part, flops in forward.items() if part != "experts"}
    if GATE_STEM in frozen:
        shared[GATE_STEM] = forward["stem"]
    idle = sum(flops for part, flops in shared.items() if part in frozen)
    idle += forward.get(SHARED_EXPERT, 0.0) if "stem" in frozen else 0.0
    size = {
        part: count_bytes(params.get(part, {})) for part in PARTS if part != "experts"
    }
    personal = PARTS if strategy.silent else strategy.personal
    return Costs(
        stem_bytes=size["stem"],
        head_bytes=size["head"],
        gate_bytes=size["gate"],
        expert_bytes=count_bytes(params["experts"]) / num_experts,
        frozen_bytes=count_bytes(frozen),
        shared_flops=float(TRAINING_PASSES * sum(shared.values())),
        expert_flops=float(TRAINING_PASSES * forward["experts"]),
        frozen_flops=float(TRAINING_PASSES * idle),
        fixed_flops=float(fixed[0]),
        fixed_expert_flops=float(fixed[1]),
        dense_flops=float(TRAINING_PASSES * dense),
        travel_bytes=float(sum(size[part] for part in size if part not in personal)),
        copies=2 if strategy.variates else 1,
        num_layers=len(params["experts"]),
    )


def scale_costs(costs: Costs, scale: float) -> Costs:
    """The costs of a model `scale` > 0 times as large in every part."""
    scaled = {name: float(scale * cost) for name, cost in costs._asdict().items()}
    counts = {"copies": costs.copies, "num_layers": costs.num_layers}
    return costs._replace(**scaled | counts)


class Traffic(struct.PyTreeNode):
    """Experts that each client holds, trains, sends and receives, as [C] float32.

    A pruned expert is the share of one that is left.

    Attributes:
      held: experts.
      trained: experts with a backward pass.
      sent: experts whose update enters the average, and what goes to other clients.
      received: experts.
      reported: numbers of feedback and of the strategy's report.
      shown: 1 where the client shows its personal gate, else 0.
      new: 1 where the client gets frozen parts, in its first round, else 0.
      probed: examples that the client runs forward to probe its experts: those of one
        batch once for every expert of every layer. None where nothing is probed.
      biases: numbers of the gates' bias, one for each held expert; None without one.
      forward: experts that run forward on what is trained; None for all that are held.
      pruned: share of the stem's bytes that the client leaves out; None where it is
        whole.
      saved: share of the FLOPs of all but the experts that the client leaves out; None
        likewise.
      slots: experts that the client holds a part of; None where nothing is pruned.
      density: FLOPs of what is left of these, as a multiple of those that go with its
        share, `held`; None likewise.
    """

    held: Array
    trained: Array
    sent: Array
    received: Array
    reported: Array
    shown: Array
    new: Array
    probed: Array | None = None
    biases: Array | None = None
    forward: Array | None = None
    pruned: Array | None = None
    saved: Array | None = None
    slots: Array | None = None
    density: Array | None = None


def train_chosen(
    traffic: Traffic, chosen: Array | None, kept: Array | None = None
) -> Traffic:
    """The traffic of clients that train only some of the experts that they hold.

    They give feedback on these alone, beside the probes of all.

    Args:
      traffic: leaves [...], of all that is held.
      chosen: [..., G, K] bool, the slots that are trained; None for all.
      kept: [..., G, K] float32, the share of each held expert that is not pruned, 0 of
        empty slots; None for whole ones.
    """
    if chosen is None:
        return traffic
    slots, num_layers = chosen.sum((-2, -1)), chosen.shape[-2]
    count = slots / num_layers
    idle = num_layers * traffic.held - slots
    if kept is not None:
        count = (chosen * kept).sum((-2, -1)) / num_layers
        idle = (kept > 0).sum((-2, -1)) - slots
    reported = traffic.reported - FEEDBACK_NUMBERS * idle
    return traffic.replace(
        trained=jnp.minimum(traffic.trained, count),
        reported=jnp.maximum(reported, 0.0),  # silent clients report nothing
        forward=count,
    )


def add_cover(traffic: Traffic, cover: Array, slots: Array, probes: bool) -> Traffic:
    """The traffic with that of experts that clients ask for and do not train.

    These take the form of what they cover: they are received and sent, and feedback on
    them and their bias travel; but a client neither keeps them nor runs them.

    Args:
      traffic: leaves [C], of what is held.
      cover: [C] float32 >= 0, whole experts, a layer.
      slots: [C] int32 >= 0, experts that are asked for and not held, in all layers.
      probes: whether feedback has the loss of a probe.
    """
    biases = None if traffic.biases is None else traffic.biases + slots
    return traffic.replace(
        received=traffic.received + cover,
        reported=traffic.reported + (FEEDBACK_NUMBERS + probes) * slots,
        biases=biases,
    )


def client_bytes(costs: Costs, traffic: Traffic) -> tuple[Array, Array]:
    """Bytes that each client sends and receives in one round.

    Both ways go stem, gate and head, but for what stays, and some experts. Upwards go
    the feedback and what a client shows, downwards once what is frozen, and the bias.

    Args:
      costs: of the model that travels.
      traffic: what travels.

    Returns:
      `(up, down)`, each [C] float32 bytes. Not int32, which ends at 2 GiB; float32
      rounds beyond 16 MiB, by less than one part in ten million.
    """
    up = costs.copies * (costs.travel_bytes + costs.expert_bytes * traffic.sent)
    up += NUMBER_BYTES * traffic.reported + costs.gate_bytes * traffic.shown
    down = costs.copies * (costs.travel_bytes + costs.expert_bytes * traffic.received)
    down += costs.frozen_bytes * traffic.new
    if traffic.pruned is not None:
        saved = costs.copies * costs.stem_bytes * traffic.pruned
        up, down = up - saved, down - saved
    return up, down if traffic.biases is None else down + NUMBER_BYTES * traffic.biases


def client_parameters(costs: Costs, traffic: Traffic) -> Array:
    """Parameters that each client has while it trains: [C] float32.

    Where control variates travel, these include its own and their mean.

    Args:
      costs: of the model that is trained.
      traffic: experts held.
    """
    held = costs.shared_bytes + costs.gate_bytes + costs.expert_bytes * traffic.held
    if traffic.pruned is not None:
        held -= costs.stem_bytes * traffic.pruned
    variates = 2 * (costs.copies - 1) * (held - costs.frozen_bytes)
    return (held + variates) / NUMBER_BYTES


def prune_flops(costs: Costs, traffic: Traffic) -> tuple[Costs, Any]:
    """The costs with the FLOPs, now [C], of a whole expert's worth of pruned ones.

    What an expert keeps fixed is in each of those that a client holds a part of.

    Returns:
      The costs, and the share of an expert that is left of one, [C] or 1.
    """
    if traffic.density is None:
        return costs, 1.0
    assert traffic.slots is not None and traffic.saved is not None
    share = traffic.held / jnp.maximum(traffic.slots, ROUNDING)
    fixed = costs.fixed_expert_flops / jnp.maximum(share, ROUNDING)
    pruned = costs._replace(
        shared_flops=costs.shared_flops * (1 - traffic.saved),
        expert_flops=costs.expert_flops * traffic.density,
        fixed_expert_flops=fixed,
    )
    return pruned, share


def client_flops(costs: Costs, traffic: Traffic, examples: Array) -> Array:
    """FLOPs of each client's local training, and of the probe before it.

    Every expert is counted for every example. That is what training without sparse
    dispatch does, and the most that routing can ask for. A probe counts as many passes
    as there are experts to be probed, see `probe_flops`.

    Args:
      costs: of the model that is trained.
      traffic: experts held, those of them that run forward, and trained, those
        backward.
      examples: [] or [C] float32, examples each client trains, repeats included.

    Returns:
      [C] float32.
    """
    costs, share = prune_flops(costs, traffic)
    forward = traffic.held if traffic.forward is None else traffic.forward
    untrained = forward - traffic.trained
    per_example = costs.shared_training_flops
    per_example += costs.expert_training_flops * traffic.trained
    per_example += costs.expert_flops / TRAINING_PASSES * untrained
    training = per_example * examples
    if traffic.probed is None:
        return training
    return training + probe_flops(costs, traffic.held, share) * traffic.probed


def probe_flops(costs: Costs, held: Any, share: Any = 1.0) -> Any:
    """FLOPs of one example forward with one expert alone in one of the MoE layers.

    All `held` experts of each other layer are counted, and what passes have in common
    is counted in each. Of the one, as of `held`, only the `share` that is not pruned.
    """
    others = costs.num_layers - 1
    return answer_flops(costs, (others * held + share) / costs.num_layers)


def answer_flops(costs: Costs, experts: Any) -> Any:
    """FLOPs of one example forward, through what all share and so many experts.

    Of several MoE layers so many in each, or on average. A gate is counted also where
    it has only one expert, as in training.
    """
    return (costs.shared_flops + experts * costs.expert_flops) / TRAINING_PASSES


def client_memory(costs: Costs, traffic: Traffic) -> Array:
    """Bytes that training takes on each client: [C] float32.

    What only runs forward needs its parameters alone. Where control variates travel, a
    client has its own and their mean.

    Args:
      costs: scaled, what the devices feel.
      traffic: experts held and trained.
    """
    shared = costs.shared_bytes + costs.gate_bytes
    all_parts = shared + costs.expert_bytes * traffic.held
    if traffic.pruned is not None:
        all_parts -= costs.stem_bytes * traffic.pruned
    untrained = costs.expert_bytes * (traffic.held - traffic.trained)
    untrained += costs.frozen_bytes
    variates = 2 * (costs.copies - 1) * (all_parts - costs.frozen_bytes)
    return TRAINING_COPIES * (all_parts - untrained) + untrained + variates


def fits_memory(costs: Costs, traffic: Traffic, memory: Array) -> Array:
    """[C] bool, whether training fits into each client's memory, [C] bytes."""
    return client_memory(costs, traffic) <= (1 + ROUNDING) * memory


def exceeds_room(costs: Costs, traffic: Traffic, room: Array) -> Array:
    """[C] bool, whether clients train more bytes than those of `room` [C] experts."""
    saved = 0.0 if traffic.pruned is None else costs.stem_bytes * traffic.pruned
    most = (1 + ROUNDING) * costs.expert_bytes * room
    return costs.expert_bytes * traffic.trained - saved > most


def expert_seconds(devices: Devices, up: Array, down: Array, flops: Array) -> Array:
    """Seconds that each expert adds to a client's round: download, training, upload.

    `T_ce = b_e / R_down + flops / f_c + b_e / R_up`, without latency, which the rest of
    the model pays for.

    Args:
      devices: rows [C] of the cohort.
      up: [C, E] float32 bytes of each expert on the way up, as devices feel them.
      down: [C, E] float32, likewise on the way down.
      flops: [C, E] float32 FLOPs of training each expert.

    Returns:
      [C, E] float32 >= 0.
    """
    chex.assert_equal_shape([up, down, flops])
    chex.assert_equal_shape_prefix([devices.flops, flops], 1)
    each = lambda rate: rate[:, None]
    travel = up / each(devices.upload) + down / each(devices.download)
    return travel + flops / each(devices.flops)


def client_seconds(
    devices: Devices,
    costs: Costs,
    traffic: Traffic,
    examples: Array,
) -> Array:
    """Seconds that each client needs for one round: download, training, upload.

    A link's latency is added where anything travels.

    Args:
      devices: rows [C] of the cohort.
      costs: scaled, what the devices feel.
      traffic: what is trained and travels.
      examples: [] or [C] float32, examples each client trains, repeats included.

    Returns:
      [C, 3] float32, one part after the other, without overlap.
    """
    chex.assert_equal_shape([devices.flops, traffic.held])
    up, down = client_bytes(costs, traffic)
    training = client_flops(costs, traffic, examples) / devices.flops
    travel = lambda count, rate: jnp.where(
        count > 0, count / rate + devices.latency, 0.0
    )
    phases = travel(down, devices.download), training, travel(up, devices.upload)
    return jnp.stack(phases, axis=-1)
