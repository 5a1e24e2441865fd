"""The server's belief about the clients' devices (paper III-B-3).

It sees the truth (`oracle`), what clients report of themselves (`self_reported`, with
errors), or only how long they took and whether they failed (`estimated`). A belief is
renewed every few rounds and holds in between.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.program import Program
from fedmoe_jax.reply import Reply
from fedmoe_jax.types import Array, Devices, Federation, Hyper, Keys, PyTree, Sizes
from fedmoe_jax.world.costs import NUMBER_BYTES, Costs, client_bytes, client_flops
from fedmoe_jax.world.limits import find_room, true_capacity
from fedmoe_jax.world.outcome import DROPOUT, MEMORY, Conditions, Outcome
from fedmoe_jax.world.step import View

# Purposes, folded into the key of a round, and into the run's key.
REPORT, EXPLORE = 1100, 1101
HONESTY = 2**32 - 5


class History(struct.PyTreeNode):
    """The times and failures of every client's rounds so far.

    Attributes:
      pace: [N, 3] float32, seconds per byte down, per FLOP and per byte up; an EMA.
      seen: [N, 3] int32, rounds in which it has seen the time of each of these.
      room: [N] float32 in [1, K], experts for which memory was enough; an EMA of
        failures.
    """

    pace: Array
    seen: Array
    room: Array


class Speeds(struct.PyTreeNode):
    """How fast the server believes every client's device to be.

    Attributes:
      flops: [N] float32, floating-point operations per second; infinity where an
        estimating server has seen nothing yet, as below.
      upload: [N] float32, bytes per second.
      download: [N] float32, likewise.
    """

    flops: Array
    upload: Array
    download: Array


class Belief(struct.PyTreeNode):
    """The belief of the server.

    Attributes:
      capacity: [N] int32, experts of every client as of the last profile.
      history: a `History` where the server estimates, else {}.
      room: [N] float32, whole experts and a part of one, likewise; None where nothing
        is pruned.
      speeds: as of the last profile; None unless the strategy is `timed`.
    """

    capacity: Array
    history: PyTree
    room: Array | None = None
    speeds: Speeds | None = None


class Workload(NamedTuple):
    """A round's work, by which capacity is counted.

    Attributes:
      costs: scaled, what the devices feel.
      examples: [N] float32, examples a client trains in a round, > 0.
      deadline: seconds a round may take, > 0.
      communication_share: share in (0, 1) of the deadline for the network.
      max_capacity: the most experts that any client has room for.
      probed: examples that a client runs forward in a round for each expert of a layer
        that it holds, 0 for none.
      spread: experts that a client holds for each that it has room for, see
        `pruning.spread`.
      saving: share of an expert's FLOPs that pruning can save.
    """

    costs: Costs
    examples: Array
    deadline: float
    communication_share: float
    max_capacity: int
    probed: int
    spread: Array | float = 1.0
    saving: float = 1.0


class Capacity(NamedTuple):
    """The capacity of every client in a round, in experts.

    Attributes:
      belief: the server's, renewed where a profile is due.
      buffered: [N] int32, the belief of a server without errors, margin kept.
      true: [N] int32, what the devices can hold without any margin, up to E.
      room: [N] float32, likewise, with the part of an expert; None where nothing is
        pruned.
    """

    belief: Belief
    buffered: Array
    true: Array
    room: Array | None = None


def count_examples(federation: Federation, sizes: Sizes) -> Array:
    """Examples every client trains in a round, repeats included: [N] float32."""
    return (federation.steps * sizes.batch_size).astype(jnp.float32)


def count_workload(federation: Federation, program: Program) -> Workload:
    """The work of a round under a program."""
    devices, sizes = program.static.devices, program.sizes
    return Workload(
        costs=program.device_costs,
        examples=count_examples(federation, sizes),
        deadline=devices.deadline,
        communication_share=devices.communication_share,
        max_capacity=sizes.max_capacity,
        probed=sizes.num_layers * sizes.batch_size * program.static.probes,
    )


def init_belief(
    num_clients: int,
    max_capacity: int,
    kind: str,
    *,
    pruned: bool = False,
    timed: bool = False,
) -> Belief:
    """The belief before the first round: every client can hold all experts.

    Args:
      num_clients: N.
      max_capacity: the most experts that any client has room for.
      kind: `oracle`, `self_reported` or `estimated`.
      pruned: whether the server also believes in `room`.
      timed: whether it also believes in `speeds`.
    """
    capacity = jnp.full(num_clients, max_capacity, jnp.int32)
    room = capacity.astype(jnp.float32) if pruned else None
    endless = jnp.full(num_clients, jnp.inf, jnp.float32)
    speeds = Speeds(endless, endless, endless) if timed else None
    if kind != "estimated":
        return Belief(capacity, {}, room, speeds)
    history = History(
        pace=jnp.zeros((num_clients, 3)),
        seen=jnp.zeros((num_clients, 3), jnp.int32),
        room=jnp.full(num_clients, float(max_capacity)),
    )
    return Belief(capacity, history, room, speeds)


def report_devices(
    key: Array, bias_key: Array, devices: Devices, *, deviation: Array, fixed: Array
) -> Devices:
    """The devices as clients report them: each client's resources times `1 + error`.

    The error is `deviation (fixed u + (1 - fixed) v)`, u and v uniform on [-1, 1], u of
    the client and v of the report.

    Args:
      key: of the round, for v.
      bias_key: the same in every round, for u.
      devices: leaves [N].
      deviation: [] in [0, 1), the largest error.
      fixed: [] in [0, 1], its share that is a client's bias.
    """
    draw = lambda k: jax.random.uniform(k, devices.memory.shape, minval=-1.0)
    error = deviation * (fixed * draw(bias_key) + (1 - fixed) * draw(key))
    return devices.replace(
        memory=(1 + error) * devices.memory,
        flops=(1 + error) * devices.flops,
        upload=(1 + error) * devices.upload,
        download=(1 + error) * devices.download,
    )


def estimate_devices(history: History, devices: Devices) -> Devices:
    """Devices as fast as they have been; without limits where nothing was seen.

    Their memory shows only in failures, see `History.room`; latencies are known.
    """
    down, flop, up = history.pace.T
    return devices.replace(
        memory=jnp.full_like(devices.memory, jnp.inf),
        flops=1 / flop,
        upload=1 / up,
        download=1 / down,
    )


def describe_work(buffer: Array, workload: Workload) -> dict[str, Any]:
    """The arguments of `limits.find_room` beside the devices and costs."""
    return dict(
        buffer=buffer,
        examples=workload.examples,
        deadline=workload.deadline,
        communication_share=workload.communication_share,
        probed=workload.probed,
        spread=workload.spread,
        saving=workload.saving,
    )


def count_capacity(devices: Devices, buffer: Array, workload: Workload) -> Array:
    """Experts that each device can hold, [N] int32 from 0 on, see `true_capacity`."""
    work, most = describe_work(buffer, workload), workload.max_capacity
    return true_capacity(devices, workload.costs, max_capacity=most, **work)


def count_room(devices: Devices, buffer: Array, workload: Workload) -> Array:
    """As `count_capacity`, with the part of an expert: [N] float32."""
    return find_room(devices, workload.costs, **describe_work(buffer, workload))


def estimate_capacity(
    key: Array, history: History, devices: Devices, hyper: Hyper, workload: Workload
) -> Array:
    """[N] int32 experts by observed paces and failures, now and then one more.

    The buffer is kept of the room as of every other resource, but not when exploring.
    """
    by_pace = count_capacity(
        estimate_devices(history, devices), hyper.devices.buffer, workload
    )
    explore = hyper.profile.exploration
    more = jax.random.bernoulli(key, explore, history.room.shape)
    usual = jnp.floor((1 - hyper.devices.buffer) * history.room + 0.5)
    # Without the margin: only a load beyond the room so far can show more room.
    by_room = jnp.where(more, jnp.floor(history.room) + 1, usual).astype(jnp.int32)
    by_room = jnp.minimum(by_room, workload.max_capacity)
    return jnp.minimum(by_pace, by_room)


def update_belief(
    belief: Belief,
    devices: Devices,
    hyper: Hyper,
    workload: Workload,
    kind: str,
    round: Array,
    keys: Keys,
) -> Belief:
    """Step 2 of a round: the belief, renewed where a profile is due.

    Args:
      belief: before the round.
      devices: leaves [N], the truth of this round.
      hyper: gives `buffer` and the numbers of the profile.
      workload: of a round.
      kind: `oracle`, `self_reported` or `estimated`.
      round: [] int32.
      keys: of the round and the run.
    """
    numbers = hyper.profile
    if kind == "estimated":
        capacity = estimate_capacity(
            keys.of(EXPLORE), belief.history, devices, hyper, workload
        )
        if belief.speeds is not None or belief.room is not None:
            devices = estimate_devices(belief.history, devices)
    else:
        if kind == "self_reported":
            devices = report_devices(
                keys.of(REPORT),
                keys.always(HONESTY),
                devices,
                deviation=numbers.deviation,
                fixed=numbers.fixed,
            )
        capacity = count_capacity(devices, hyper.devices.buffer, workload)
    capacity = jnp.maximum(capacity, 1)  # the weakest still take one, and may be late
    due = round % numbers.refresh == 0
    renew = lambda new, old: jnp.where(due, new, old)
    speeds, room = belief.speeds, belief.room
    if speeds is not None:
        seen = Speeds(devices.flops, devices.upload, devices.download)
        speeds = jax.tree.map(renew, seen, speeds)
    if room is not None:
        seen = count_room(devices, hyper.devices.buffer, workload)
        if kind == "estimated":  # memory shows in failures alone
            seen = jnp.minimum(seen, capacity)
        room = renew(seen, room)
    capacity = renew(capacity, belief.capacity)
    return belief.replace(capacity=capacity, room=room, speeds=speeds)


def profile_links(view: View, kind: str) -> Devices:
    """The devices of a round as a profile sees them.

    Args:
      view: of the world in this round.
      kind: `round`, with the links as they are in this round, slowed by other users and
        the radio channel, or `device`, with the device's own, whatever slows them.
    """
    if kind == "round":
        return view.devices
    own = view.federation.devices
    return view.devices.replace(upload=own.upload, download=own.download)


def measure_capacity(
    belief: Belief,
    view: View,
    hyper: Hyper,
    program: Program,
    round: Array,
    keys: Keys,
) -> Capacity:
    """Step 2 of a round: capacity as believed, as it should be believed, and in truth.

    Args:
      belief: before the round.
      view: of the world in this round.
      hyper: gives `devices.buffer` and the numbers of the profile.
      program: gives the costs of the model and the kind of profile.
      round: [] int32.
      keys: of the round and the run.
    """
    workload, devices = count_workload(view.federation, program), view.devices
    if program.units:
        workload = workload._replace(
            spread=hyper.pruning.spread, saving=program.savings.of_expert
        )
    kind = program.static.profile.kind
    wide = max(program.sizes.num_experts, workload.max_capacity)
    buffered = count_capacity(devices, hyper.devices.buffer, workload)
    none = jnp.zeros(())
    profiled = profile_links(view, program.static.profile.links)
    return Capacity(
        belief=update_belief(belief, profiled, hyper, workload, kind, round, keys),
        buffered=jnp.maximum(buffered, 1),
        true=count_capacity(devices, none, workload._replace(max_capacity=wide)),
        room=count_room(devices, none, workload) if program.units else None,
    )


def fill_up(trained: Array, room: Array, unit: float) -> Array:
    """Experts trained, or the room for them where no further unit would have fitted.

    Else an estimate of the room would never grow past a whole number, of which pruned
    experts fill all but a part of a unit.

    Args:
      trained: [C] float32, whole experts and a part of one.
      room: [C] float32, granted.
      unit: the largest unit, as a part of an expert.
    """
    return jnp.where(room - trained <= unit, jnp.maximum(room, trained), trained)


def learn_devices(
    belief: Belief,
    conditions: Conditions,
    replies: Reply,
    hyper: Hyper,
    program: Program,
) -> Belief:
    """The belief after the round; an estimating server has seen times and failures."""
    if not belief.history:
        return belief
    costs = program.device_costs
    traffic = conditions.traffic.replace(sent=replies.sent)
    up, down = client_bytes(costs, traffic)
    flops = client_flops(costs, traffic, conditions.examples)
    trained = traffic.trained
    if belief.room is not None:
        unit = NUMBER_BYTES * max(each.entries for each in program.units)
        part = unit / program.costs.expert_bytes
        trained = fill_up(trained, belief.room[conditions.client], part)
    history = update_history(
        belief.history,
        conditions.client,
        trained,
        jnp.stack([down, flops, up], axis=-1),
        replies.outcome,
        conditions.device.latency,
        rate=hyper.profile.rate,
        caution=hyper.profile.caution,
        max_capacity=program.sizes.max_capacity,
    )
    return belief.replace(history=history)


def update_history(
    history: History,
    client: Array,
    trained: Array,
    work: Array,
    outcome: Outcome,
    latency: Array,
    *,
    rate: Array,
    caution: Array,
    max_capacity: int,
) -> History:
    """Learns from one round's times and failures.

    Times are known of every phase that at least began, from how far it got, but not of
    clients that dropped out and report nothing. The mean of the first few counts until
    there are enough for the EMA. Memory that failed at `trained` experts pulls the room
    towards `trained - caution`; a client that got to training has room for them.

    Args:
      history: before the round.
      client: [C] int32.
      trained: [C] float32, experts with a backward pass, which is what fills memory.
      work: [C, 3] float32, bytes down, FLOPs and bytes up, as the devices feel them.
      outcome: leaves with a leading C axis.
      latency: [C] seconds.
      rate: [] weight of the newest observation.
      caution: [] experts, >= 1.
      max_capacity: K.
    """
    code = outcome.code
    reports = (outcome.spent > 0) & (code != DROPOUT)[:, None]
    travel = jnp.stack([latency, jnp.zeros_like(latency), latency], axis=-1)
    pace = (outcome.phases - travel) / jnp.where(work > 0, work, 1.0)
    old, seen = history.pace[client], history.seen[client]
    weight = jnp.maximum(rate, 1 / (seen + 1.0))
    known = reports & (work > 0)
    pace = jnp.where(known, (1 - weight) * old + weight * pace, old)

    room = history.room[client]
    aim = jnp.minimum(trained - caution, room)
    less = jnp.maximum((1 - rate) * room + rate * aim, 1.0)
    enough = jnp.minimum(jnp.maximum(room, trained), max_capacity)
    enough = jnp.where(reports[:, 1], enough, room)
    room = jnp.where(code == MEMORY, less, enough)
    return History(
        pace=history.pace.at[client].set(pace),
        seen=history.seen.at[client].add(known),
        room=history.room.at[client].set(room),
    )
