"""The pruned sub-models of a cohort: which units each client keeps of what it holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Units
from fedmoe_jax.program import Program
from fedmoe_jax.pruning.choose import Group, choose_units
from fedmoe_jax.pruning.importance import (
    init_importance,
    learn_importance,
    measure_magnitude,
)
from fedmoe_jax.pruning.savings import save_flops
from fedmoe_jax.pruning.scores import MEASURED, SCORES, Layer
from fedmoe_jax.pruning.units import of_part, share_experts
from fedmoe_jax.reply import Reply
from fedmoe_jax.types import (
    Array,
    Assignment,
    ClientInput,
    Evidence,
    Hyper,
    PyTree,
    SimState,
    Sizes,
)
from fedmoe_jax.world.costs import NUMBER_BYTES

# Purposes, folded into the run's key.
LOTS = 2**32 - 8


class Knowledge(NamedTuple):
    """What the server knows about units, [n] of the stem's and [G, E, n] of experts'.

    Attributes:
      importance: see `importance.learn_importance`; 0 where it is not measured.
      magnitude: of the params as they are.
    """

    importance: dict[str, Array]
    magnitude: dict[str, Array]


def init_pruning(params: PyTree, program: Program) -> dict[str, Array]:
    """The importance of units before the first round; {} where it is not measured."""
    if program.static.pruning.kind not in MEASURED:
        return {}
    return init_importance(params, program.units)


def spread_room(room: Array, round: Array, hyper: Hyper, sizes: Sizes) -> Array:
    """Experts that clients hold, pruned to the bytes of `room` whole ones.

    `room` times `pruning.spread`, rounded up, which is reached from 1 by a cubic
    schedule, `1 + (spread - 1) (1 - (1 - t / ramp)^3)` (arXiv 1710.01878; there it is
    the sparsity that grows, here bytes stay what the device has room for).

    Args:
      room: [C] float32, whole experts.
      round: [] int32, t.
      hyper: gives `pruning.spread` and `pruning.ramp`.
      sizes: static sizes.

    Returns:
      [C] int32 in [1, K].
    """
    numbers = hyper.pruning
    progress = jnp.clip(round / jnp.maximum(numbers.ramp, 1), 0.0, 1.0)
    progress = jnp.where(numbers.ramp > 0, progress, 1.0)
    spread = 1 + (numbers.spread - 1) * (1 - (1 - progress) ** 3)
    experts = jnp.ceil(room * spread - 1e-4)
    return jnp.clip(experts, 1, sizes.max_capacity).astype(jnp.int32)


def draw_lots(key: Array, client: Array, number: int, shape: tuple[int, ...]) -> Array:
    """Lots [shape] in [0, 1) of ONE client, the same in every round of a run.

    Args:
      key: of the run, not consumed.
      client: [] int32, id.
      number: of the units among those of the program.
      shape: one lot for each unit.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, LOTS), number)
    return jax.random.uniform(jax.random.fold_in(key, client), shape)


def know_units(
    params: PyTree, importance: dict[str, Array], program: Program
) -> Knowledge:
    """The server's knowledge in a round."""
    magnitude = measure_magnitude(params, program.units)
    unknown = jax.tree.map(jnp.zeros_like, magnitude)
    return Knowledge(importance or unknown, magnitude)


def prune_client(
    knowledge: Knowledge,
    client: Array,
    held: Array,
    slot: Array,
    room: Array,
    round: Array,
    key: Array,
    hyper: Hyper,
    program: Program,
) -> dict[str, Array]:
    """The units that ONE client keeps: bool, [n] of the stem's, [G, K, n] of experts'.

    Args:
      knowledge: of the server.
      client: [] int32, id.
      held: [G, K] int32.
      slot: [G, K] bool.
      room: [] float32, whole experts that the device has room for.
      round: [] int32.
      key: of the run, not consumed.
      hyper: gives the numbers of `pruning`.
      program: the static parts.
    """
    numbers, score = hyper.pruning, SCORES[program.static.pruning.kind]
    layer = jnp.arange(len(held))[:, None]

    def make_group(number: int, unit: Units) -> Group:
        importance, magnitude = (each[unit.name] for each in knowledge)
        lots = draw_lots(key, client, number, importance.shape)
        rows, valid = (importance, magnitude, lots), jnp.ones(1, bool)
        if unit.part == "experts":
            rows, valid = [row[layer, held] for row in rows], slot.ravel()
        rows = [row.reshape(-1, unit.count) for row in rows]
        one = lambda *row: score(Layer(row[0], row[1], row[2], numbers.gap))
        cost = jnp.float32(NUMBER_BYTES * unit.entries)
        return Group(jax.vmap(one)(*rows), valid, cost)

    masks = choose_units(
        [make_group(*each) for each in enumerate(program.units)],
        count_room(room, slot, program),
        floor=numbers.floor,
        rotation=numbers.rotation,
        client=client,
        round=round,
    )
    shape = lambda unit: slot.shape if unit.part == "experts" else ()
    return {
        unit.name: mask.reshape(*shape(unit), unit.count)
        for unit, mask in zip(program.units, masks, strict=True)
    }


def count_room(room: Array, slot: Array, program: Program) -> Array:
    """Bytes for units: room [] for whole experts and the stem's units, less the rest.

    Args:
      room: [] float32, whole experts beside the whole stem.
      slot: [G, K] bool; every held expert has entries that are not pruned.
      program: the costs of whole experts.
    """
    stem = sum(unit.count * unit.entries for unit in of_part(program.units, "stem"))
    rest = program.rest_entries * slot.sum()
    return room * program.costs.expert_bytes + NUMBER_BYTES * (stem - rest)


def share_pruned_stem(masks: dict[str, Array], program: Program) -> Array | None:
    """The share [] of the stem's bytes that ONE client leaves out; None for none.

    A leaf between two layers counts with its outputs, so that it is never too much. A
    stem that stays with the clients is stored whole.
    """
    stem = of_part(program.units, "stem")
    if not stem or "stem" in program.strategy.personal or program.strategy.silent:
        return None
    pruned = sum(unit.entries * (~masks[unit.name]).sum() for unit in stem)
    return jnp.asarray(NUMBER_BYTES * pruned / program.costs.stem_bytes)


def save_shared(masks: dict[str, Array], program: Program) -> Array:
    """The share [] of the FLOPs of all but the experts that ONE client leaves out.

    With a single expert, whose FLOPs are not counted apart, those that it saves, too.
    """
    saved, found = jnp.zeros(()), program.savings
    if stem := of_part(program.units, "stem"):
        saved += save_flops(masks, stem, found.stem)
    if found.alone:
        experts = of_part(program.units, "experts")
        saved += save_flops(masks, experts, found.alone).mean()
    return saved


def measure_density(masks: dict[str, Array], share: Array, program: Program) -> Array:
    """By how much [] the FLOPs left of ONE client's experts exceed their share.

    They are so many times those that go with the share of entries that it keeps; 1 of
    none.

    Args:
      masks: see `prune_client`.
      share: [G, K] float32, of each expert that is kept, 0 of empty slots.
      program: the static parts.
    """
    units = of_part(program.units, "experts")
    left = 1 - save_flops(masks, units, program.savings.experts)
    left = jnp.where(share > 0, left, 0.0).sum()
    return jnp.where(left > 0, left / jnp.maximum(share.sum(), 1e-9), 1.0)


class Pruned(NamedTuple):
    """The pruned sub-models of a cohort.

    Attributes:
      masks: see `prune_client`, with a leading C axis.
      share: [C, G, K] float32, of each held expert that is kept, 0 of empty slots.
      density: [C] float32, see `measure_density`.
      stem: [C] float32, see `share_pruned_stem`.
      saved: [C] float32, see `save_shared`.
    """

    masks: dict[str, Array]
    share: Array
    density: Array
    stem: Array | None
    saved: Array


def prune_cohort(
    state: SimState,
    evidence: Evidence,
    assignment: Assignment,
    hyper: Hyper,
    program: Program,
) -> Pruned | None:
    """The sub-models of the cohort, [C]; None where nothing is pruned.

    Args:
      state: before the round.
      evidence: of the cohort; has `room`.
      assignment: the experts that clients hold, [C, G, K].
      hyper: hyperparameters.
      program: the static parts.
    """
    if not program.units:
        return None
    knowledge = know_units(state.params, state.pruning, program)

    def one_client(client: Array, held: Array, slot: Array, room: Array) -> Pruned:
        place = client, held, slot, room, state.round, state.key
        masks = prune_client(knowledge, *place, hyper, program)
        share = jnp.where(
            slot, share_experts(masks, program.units, program.rest_entries), 0.0
        )
        return Pruned(
            masks,
            share,
            density=measure_density(masks, share, program),
            stem=share_pruned_stem(masks, program),
            saved=save_shared(masks, program),
        )

    assert evidence.room is not None
    rows = evidence.client, assignment.held, assignment.slot, evidence.room
    return jax.vmap(one_client)(*rows)


def expect_shares(
    state: SimState, evidence: Evidence, hyper: Hyper, program: Program
) -> Array:
    """The share of each expert that clients can be expected to keep: [C, E] float32.

    What they would keep of it if they held all E, in E / k_c times the room that they
    have for k_c, so that bytes are as scarce; the mean over MoE layers. What they do
    hold is not known yet, and moves the threshold.

    Args:
      state: before the round.
      evidence: of the cohort; has `room`.
      hyper: hyperparameters.
      program: the static parts, with units.
    """
    knowledge, sizes = know_units(state.params, state.pruning, program), program.sizes
    layers, experts = sizes.num_layers, sizes.num_experts
    held = jnp.broadcast_to(jnp.arange(experts), (layers, experts))

    def one_client(client: Array, room: Array) -> Array:
        place = client, held, jnp.ones(held.shape, bool), room, state.round, state.key
        masks = prune_client(knowledge, *place, hyper, program)
        return share_experts(masks, program.units, program.rest_entries).mean(axis=0)

    assert evidence.room is not None
    room = evidence.room * experts / evidence.capacity
    return jax.vmap(one_client)(evidence.client, room)


def prune_held(
    state: SimState,
    client: Array,
    held: Array,
    slot: Array,
    hyper: Hyper,
    program: Program,
) -> dict[str, Array]:
    """The units that ONE client would keep now of the experts that it holds.

    Arguments and masks as of `prune_client`.
    """
    knowledge = know_units(state.params, state.pruning, program)
    place = state.belief.room[client], state.round, state.key
    return prune_client(knowledge, client, held, slot, *place, hyper, program)


def count_reported(pruned: Pruned, program: Program) -> Array:
    """Numbers [C] by which clients report the importance of what they keep."""
    if program.static.pruning.kind not in MEASURED:
        return jnp.zeros(len(pruned.share))
    each = [mask.reshape(len(mask), -1).sum(1) for mask in pruned.masks.values()]
    return jnp.asarray(sum(each), jnp.float32)


def learn_units(
    importance: dict[str, Array],
    inputs: ClientInput,
    replies: Reply,
    hyper: Hyper,
    program: Program,
) -> dict[str, Array]:
    """The importance of units after a round; {} where it is not measured."""
    if not importance:
        return {}
    return learn_importance(
        importance,
        replies.importance,
        inputs.masks,
        inputs.held,
        replies.feedback.routed,
        replies.arrived,
        hyper.pruning.rate,
        program.units,
    )
