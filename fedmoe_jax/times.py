"""The time of a round's work as the server expects it, for strategies that are timed.

In a radio cell sender and receiver agree on a rate, which follows from the channel as
they know it (`world.channel.link`). The server sees these rates: its expectation
depends on the known channel alone, and whether a link will fail it does not know. Links
by wire and the speed of a device are what its last profile says, see `capacity`.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.broadcast import plan_traffic
from fedmoe_jax.capacity import Belief
from fedmoe_jax.program import Program
from fedmoe_jax.prune import expect_shares
from fedmoe_jax.types import (
    Array,
    Assignment,
    Devices,
    Evidence,
    Hyper,
    SimState,
    Times,
)
from fedmoe_jax.world.costs import (
    FEEDBACK_NUMBERS,
    NUMBER_BYTES,
    client_seconds,
    expert_seconds,
    probe_flops,
)
from fedmoe_jax.world.step import View


def expect_devices(
    view: View, cohort: Array, belief: Belief, program: Program
) -> Devices:
    """The devices of the cohort [C], as fast as the server expects them to be.

    Args:
      view: of the world in this round; its links by radio are at the agreed rates.
      cohort: [C] int32.
      belief: with `speeds`.
      program: whether clients share a radio cell.
    """
    speeds, devices = belief.speeds, view.devices
    assert speeds is not None
    devices = devices.replace(flops=speeds.flops)
    if program.static.channel.kind != "wireless":
        devices = devices.replace(upload=speeds.upload, download=speeds.download)
    return jax.tree.map(lambda leaf: leaf[cohort], devices)


def count_experts(
    evidence: Evidence, kept: Array, program: Program
) -> tuple[Array, Array, Array]:
    """What each expert, of all MoE layers, adds to a client's round.

    Args:
      evidence: of the cohort.
      kept: [C, E] float32 in [0, 1], share of each that is not pruned.
      program: the costs of whole experts, which are equally large.

    Returns:
      Bytes up and down as devices feel them, and FLOPs, [C, E] each. Where experts are
      probed next to those of other layers, a client with room for k_c holds them.
    """
    costs, sizes, static = program.device_costs, program.sizes, program.static
    size = costs.copies * costs.expert_bytes * kept
    slots = NUMBER_BYTES * sizes.num_layers  # bytes of a number for each layer
    up = size + slots * (FEEDBACK_NUMBERS + static.probes)
    down = size if program.strategy.affinity is None else size + slots
    left = 1 - program.savings.of_expert * (1 - kept)
    flops = costs.expert_flops * left - costs.fixed_expert_flops
    flops = flops * evidence.load[:, None]
    if static.probes:
        passes = sizes.num_layers * sizes.batch_size
        flops += passes * probe_flops(costs, evidence.capacity)[:, None]  # whole ones
    return up, down, flops


def hold_nothing(count: int, program: Program) -> Assignment:
    """The assignment of clients [C] without any expert."""
    shape = count, program.sizes.num_layers, program.sizes.max_held
    return Assignment(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def add_times(
    evidence: Evidence,
    state: SimState,
    view: View,
    belief: Belief,
    hyper: Hyper,
    program: Program,
) -> Evidence:
    """The evidence with `times` if the strategy is `timed`, else as it is.

    Args:
      evidence: of the cohort, all layers.
      state: before the round.
      view: of the world in this round.
      belief: of the server in this round.
      hyper: gives `devices.buffer`.
      program: the costs of the model, and the deadline.
    """
    if not program.strategy.timed:
        return evidence
    cohort, deadline = evidence.client, program.static.devices.deadline
    devices = expect_devices(view, cohort, belief, program)
    nothing = hold_nothing(len(cohort), program)
    equipped = state.participation.equipped[cohort]
    traffic = plan_traffic(evidence, nothing, None, equipped, hyper, program)
    shared = client_seconds(devices, program.device_costs, traffic, evidence.load)
    kept = jnp.ones(evidence.fitness[:, 0].shape)
    if program.units:
        kept = expect_shares(state, evidence, hyper, program)
    costs = count_experts(evidence, kept, program)
    times = Times(
        expert=expert_seconds(devices, *costs) / deadline,
        room=1 - hyper.devices.buffer - shared.sum(axis=1) / deadline,
    )
    return evidence.replace(times=times)
