"""The metrics of one round, measured inside the compiled program.

Bytes and FLOPs are those of the simulated model, and what was lost had cost what it had
cost by then; seconds and joules are those of the devices, which feel the model that it
stands for.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.usage import load_cv, load_entropy, starved
from fedmoe_jax.capacity import Capacity
from fedmoe_jax.evaluation.scoring import evaluation_route
from fedmoe_jax.floors import measure_queues
from fedmoe_jax.options import UserError
from fedmoe_jax.program import Program
from fedmoe_jax.pruning.coverage import measure_pruning
from fedmoe_jax.reply import Reply
from fedmoe_jax.runtime.scheduling import chunk_size, wasted_share
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.types import (
    AlignState,
    Array,
    ClientInput,
    Devices,
    Federation,
    Hyper,
    PyTree,
    SimState,
)
from fedmoe_jax.upcycle import is_warming
from fedmoe_jax.world.costs import (
    NUMBER_BYTES,
    TRAINING_PASSES,
    Traffic,
    answer_flops,
    client_bytes,
    client_flops,
    client_parameters,
    exceeds_room,
    fits_memory,
)
from fedmoe_jax.world.outcome import DROPPED, OUTCOMES, Conditions, Outcome
from fedmoe_jax.world.participation import Participation, jain
from fedmoe_jax.world.step import View, measure_processes

LISTED = 100  # clients up to which each has its numbers in every row
BALANCE = {
    "load_cv": load_cv,
    "load_entropy": load_entropy,
    "starved_experts": starved,
}


def count_exchange(
    exchanged: tuple[Array, Array], devices: Devices, program: Program
) -> Array:
    """[C] seconds in which clients exchange experts with others, after their round."""
    size, (sent, received) = program.device_costs.expert_bytes, exchanged
    return size * (sent / devices.upload + received / devices.download)


def add_exchange(
    traffic: Traffic, sent: Array, exchanged: tuple[Array, Array], program: Program
) -> Traffic:
    """The traffic of a round with all experts that clients have sent; see `account`."""
    talks = 0.0 if program.strategy.silent else 1.0
    return traffic.replace(
        sent=talks * (sent + exchanged[0]),
        received=traffic.received + talks * exchanged[1],
    )


def account(
    participation: Participation,
    conditions: Conditions,
    sent: Array,
    exchanged: tuple[Array, Array],
    room: Array | None,
    program: Program,
) -> dict[str, Array]:
    """The costs of a round, as metrics.

    Args:
      participation: after the round.
      conditions: under which the cohort worked, leaves [C].
      sent: [C] experts that each client sent to the server.
      exchanged: experts that each client sent to others and received from them, [C].
      room: [N] float32, see `capacity.Capacity`.
      program: the static parts.
    """
    outcome, cohort = participation.outcome, participation.client
    deadline = program.static.devices.deadline
    devices, traffic = conditions.device, conditions.traffic
    worked = outcome.phases * outcome.spent
    exchanging = count_exchange(exchanged, devices, program)
    seconds = worked.sum(1) + exchanging
    on_air = worked[:, 0] + worked[:, 2] + exchanging
    traffic = add_exchange(traffic, sent, exchanged, program)
    up, down = client_bytes(program.costs, traffic)
    flops = client_flops(program.costs, traffic, conditions.examples)
    parameters = client_parameters(program.costs, traffic)
    down, flops, up = outcome.spent.T * jnp.stack([down, flops, up])
    wasted = jnp.where(outcome.arrived, 0.0, 1.0)
    longest, worked_at_all = seconds.max(), outcome.spent[:, 0] > 0
    late = (seconds > deadline) | (outcome.code == DROPPED)
    # Some systems take more memory than the experts that they train.
    fits = fits_memory(program.device_costs, traffic, devices.memory)
    too_many = (traffic.trained > participation.capacity[cohort]) | ~fits
    if room is not None:
        too_many = exceeds_room(program.costs, traffic, room[cohort]) | ~fits
    if program.static.late.kind == "stale":  # the round ends without them
        longest = jnp.minimum(longest, deadline)
    return {
        "bytes_up": up.sum(),
        "bytes_down": down.sum(),
        "client_flops": flops.sum(),
        "wasted_bytes": (wasted * (up + down)).sum(),
        "wasted_flops": (wasted * flops).sum(),
        "compute_joules": (devices.power * worked[:, 1]).sum(),
        "radio_joules": (devices.radio * on_air).sum(),
        "peak_client_parameters": parameters.max(),
        "simulated_seconds": longest,
        "simulated_median_seconds": jnp.nanmedian(
            jnp.where(worked_at_all, seconds, jnp.nan)
        ),
        "late_clients": late.sum(),
        "capacity_violations": (worked_at_all & too_many).sum(),
        "participation_jain": jain(participation.rounds),
    }


def count_outcomes(outcome: Outcome) -> dict[str, Array]:
    """Clients by what became of their round; each is counted once."""
    counts = jax.nn.one_hot(outcome.code, len(OUTCOMES)).sum(0)
    return {
        f"{name}_clients": count for name, count in zip(OUTCOMES, counts, strict=True)
    }


def measure(
    before: SimState,
    after: SimState,
    capacity: Capacity,
    view: View,
    inputs: ClientInput,
    conditions: Conditions,
    replies: Reply,
    exchanged: tuple[Array, Array],
    load: Array,
    hyper: Hyper,
    program: Program,
) -> dict[str, Array]:
    """The metrics of one round.

    Args:
      before: the state before the round.
      after: the state after it.
      capacity: of the clients.
      view: of the world.
      inputs: of the cohort.
      conditions: of the cohort's work.
      replies: of the cohort.
      exchanged: see `account`.
      load: [G, E] examples trained.
      hyper: hyperparameters.
      program: the static parts.

    Raises:
      UserError: a metric of the strategy or of a process has a name that is taken.
    """
    participation = after.participation
    cohort = participation.client
    costs = participation, conditions, replies.sent
    found = (
        measure_learning(before.align, after.align, replies, cohort)
        | measure_load(load, is_warming(before.round, hyper))
        | account(*costs, exchanged, capacity.room, program)
        | measure_masks(inputs, conditions, capacity, replies, program)
        | count_outcomes(participation.outcome)
        | measure_work(view.federation, cohort, program)
        | measure_server(after, capacity.buffered)
        | measure_answers(program)
        | measure_stages(before.round, hyper, program)
        | measure_queues(after.queues)
    )
    found = add_messages(found, view.federation, before.round, hyper, program)
    found = add_metrics(found, measure_strategy(after.align.strategy))
    return add_metrics(found, measure_processes(after.world, program.processes))


def measure_masks(
    inputs: ClientInput,
    conditions: Conditions,
    capacity: Capacity,
    replies: Reply,
    program: Program,
) -> dict[str, Array]:
    """What the masks of pruned sub-models cover; {} where nothing is pruned."""
    if not program.units:
        return {}
    room = capacity.belief.room
    assert room is not None
    whole = jnp.floor(room[conditions.client]).astype(jnp.int32)
    return measure_pruning(
        inputs.masks,
        inputs.held,
        inputs.slot,
        jnp.maximum(whole, 0),
        replies.arrived,
        program.units,
        program.sizes.num_experts,
        program.sizes.max_capacity,
    )


def measure_strategy(state: PyTree) -> dict[str, Array]:
    """The scalars of a strategy's own state, leaves [G].

    Counts, which are integers, are summed over layers, others averaged.
    """
    join = lambda leaf: leaf.sum() if is_count(leaf) else leaf.mean()
    return {name: join(leaf) for name, leaf in state.items() if leaf.ndim == 1}


def is_count(leaf: Array) -> bool:
    """Whether an array has integers."""
    return jnp.issubdtype(leaf.dtype, jnp.integer)


def add_metrics(found: dict[str, Array], own: dict[str, Array]) -> dict[str, Array]:
    """Metrics with those of a strategy or of processes.

    Raises:
      UserError: a name is taken.
    """
    for name in own.keys() & found.keys():
        raise UserError(
            f"a strategy or process has the metric {name!r}, which is taken; allowed: "
            "another name"
        )
    return found | own


def measure_learning(
    before: AlignState, after: AlignState, replies: Reply, cohort: Array
) -> dict[str, Array]:
    """Learning of the cohort [C] and the server, means over clients."""
    held = after.held[cohort]
    arrived = replies.arrived
    count = arrived.sum()  # 0 gives NaN: a loss of 0 would look like success
    changed = jnp.where(held, jnp.abs(after.fitness - before.fitness)[cohort], 0.0)
    found = {
        "train_loss": jnp.where(arrived, replies.loss, 0.0).sum() / count,
        "train_accuracy": jnp.where(arrived, replies.accuracy, 0.0).sum() / count,
        "fitness_change": changed.sum() / held.sum(),
        "assignment_change": (held & ~before.held[cohort]).sum() / held.sum(),
    }
    if after.detector:
        alarms = after.detector.alarms - before.detector.alarms
        found["drift_alarms"] = alarms.sum()
    return found


def measure_load(load: Array, warming: Array) -> dict[str, Array]:
    """Balance of the examples [G, E] that the round has trained, mean over layers.

    Of several layers the numbers of each, too, `layer_` and the name, [G]. While a
    dense warm-up is `warming`, [] bool, there is nothing to balance, and they are NaN.
    """
    found = {"expert_load": load[0] if len(load) == 1 else load}
    for name, measure in BALANCE.items():
        layers = jnp.where(warming, jnp.nan, jax.vmap(measure)(load))
        found[name] = layers.mean(0)
        if len(load) > 1:
            found[f"layer_{name}"] = layers
    return found


def measure_work(federation: Federation, cohort: Array, program: Program) -> dict:
    """Examples trained, and how much of the simulation's devices they used."""
    sizes, num_devices = program.sizes, program.mesh.shape[CLIENTS]
    steps = federation.steps[cohort]
    chunk = chunk_size(sizes.cohort_size, num_devices, program.static.run.client_chunk)
    return {
        "examples": steps.sum() * sizes.batch_size,
        "wasted_share": wasted_share(steps, num_devices, chunk),
    }


def measure_answers(program: Program) -> dict[str, Array]:
    """FLOPs of one answer: of the experts that the gate chooses, and of all of them."""
    costs, sizes = program.costs, program.sizes
    routed = evaluation_route(program).num_active
    return {
        "answer_flops": jnp.float32(answer_flops(costs, routed)),
        "soft_answer_flops": jnp.float32(answer_flops(costs, sizes.num_experts)),
    }


def measure_stages(round: Array, hyper: Hyper, program: Program) -> dict[str, Array]:
    """FLOPs of the server's own training just before a round."""
    count = program.strategy.server_examples
    examples = count(round, hyper, program.sizes) if count else jnp.zeros(())
    return {"server_flops": program.costs.dense_flops * examples}


def add_messages(
    found: dict[str, Array],
    federation: Federation,
    round: Array,
    hyper: Hyper,
    program: Program,
) -> dict[str, Array]:
    """Metrics with the costs of what all clients sent to the stages before a round.

    Their devices feel none of it: stages take no simulated time.
    """
    if program.strategy.message is None:
        return found
    costs, sizes = program.costs, program.sizes
    numbers, passes = program.strategy.message(round, hyper, sizes)
    asked = sizes.num_clients * (numbers > 0)
    # A pretrained base comes once, in a client's first round.
    model = costs.shared_bytes - costs.frozen_bytes + costs.expert_bytes
    flops = passes / TRAINING_PASSES * costs.dense_flops
    if passes == TRAINING_PASSES:
        flops -= costs.fixed_flops + costs.fixed_expert_flops
    return found | {
        "bytes_up": found["bytes_up"] + asked * NUMBER_BYTES * numbers,
        "bytes_down": found["bytes_down"] + asked * model,
        "client_flops": found["client_flops"]
        + (numbers > 0) * flops * federation.size.sum(),
    }


def measure_server(state: SimState, buffered: Array) -> dict[str, Array]:
    """The server's error about the devices, and the participation so far."""
    found = {"capacity_error": jnp.abs(state.belief.capacity - buffered).mean()}
    if len(buffered) <= LISTED:
        found["participation"] = state.participation.rounds
    return found
