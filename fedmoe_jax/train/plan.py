"""Runs as their configs describe them, on the host, and which of them advance together.

Runs that differ only in their seed, in `Hyper` and in a strategy of equal traits share
one compiled program with a leading S axis, over the mesh axis `runs`: a wave. Runs that
differ in anything static are in different waves, and so are runs that would need more
memory together than the limit. A run alone is a wave of one.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.capacity import count_capacity, count_workload
from fedmoe_jax.config import validate
from fedmoe_jax.data.groups import NONE, check_groups, copy_groups
from fedmoe_jax.data.load import DATASETS, READS, RECORDS, load_dataset
from fedmoe_jax.disclosure.accounting import check_package
from fedmoe_jax.disclosure.observed import check_size
from fedmoe_jax.federation import make_devices, make_federation, make_partition
from fedmoe_jax.models.flops import count_activation_bytes, shape_base
from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.tokenizer import check_tokenizer
from fedmoe_jax.program import Program, build_program, make_hyper
from fedmoe_jax.runtime.scheduling import chunk_size
from fedmoe_jax.runtime.sharding import CLIENTS, build_mesh
from fedmoe_jax.state import init_state
from fedmoe_jax.strategies import either, find_strategy, traits
from fedmoe_jax.train import memory
from fedmoe_jax.types import Federation, Hyper, Partition

# Fields of the config outside `Program` in which the runs of one wave must agree.
SCHEDULE = ("num_rounds", "eval_every", "checkpoint", "data", "groups", "run")


class Plan(NamedTuple):
    """One run as its config describes it, still on the host.

    Attributes:
      config: validated.
      program: static parts.
      data: the data set.
      partition: the examples of each client.
      federation: what a round reads.
      hyper: traced hyperparameters.
      tier_names: kinds of device, in the order of their numbers.
    """

    config: ConfigDict
    program: Program
    data: Data
    partition: Partition
    federation: Federation
    hyper: Hyper
    tier_names: tuple[str, ...]


class Member(NamedTuple):
    """One run of a sweep: its folder's name and its config."""

    name: str
    config: ConfigDict


class Wave(NamedTuple):
    """Runs that advance together.

    Attributes:
      names: of the members.
      plans: of the members.
      program: what they share, with the mesh that they run on.
    """

    names: list[str]
    plans: list[Plan]
    program: Program


@functools.cache
def _load(loader: Callable | None, options: str) -> Data:
    return load_dataset(ConfigDict(json.loads(options)))


@functools.cache
def _copy(loader: Callable | None, options: str, kind: str, count: int) -> Data:
    return copy_groups(_load(loader, options), kind, count)


def find_loader(options: ConfigDict) -> tuple[Callable | None, str]:
    """The loader of a data set, None for one of TFDS, and what it reads, as text.

    The server's share of the examples is not the loader's affair.
    """
    fields = {name: value for name, value in options.items() if name != "public"}
    return DATASETS.get(options.name), json.dumps(fields, sort_keys=True)


def load_dataset_once(options: ConfigDict) -> Data:
    """As `load_dataset`, kept; a plug-in that joins anew has another loader."""
    return _load(*find_loader(options))


def load_copies_once(config: ConfigDict) -> Data:
    """The data set of a run, with copies of it where there are groups, kept.

    Raises:
      UserError: it cannot be loaded, or cannot be copied for these groups.
    """
    data, groups = load_dataset_once(config.data), config.groups
    if groups.kind == NONE:
        return data
    limit = config.run.memory_limit_gb
    check_groups(groups.kind, groups.count, data, config.data.name, limit)
    return _copy(*find_loader(config.data), groups.kind, groups.count)


def check_config(config: ConfigDict) -> None:
    """Raises UserError for a config that is not allowed, before data are loaded."""
    validate(config)
    name = config.data.name
    reads = READS.get(name, () if name in DATASETS else RECORDS)
    if config.model.base and "tokenizer" in reads:
        check_tokenizer(config.model.base, config.data.tokenizer)


def load_data(config: ConfigDict) -> None:
    """Loads the data of a run, so that they are at hand when they are asked for again.

    Raises:
      UserError: the config is not allowed or the data cannot be loaded.
    """
    check_config(config)
    load_copies_once(config)


def make_partition_once(
    config: ConfigDict, data: Data, made: dict[tuple, Partition]
) -> Partition:
    """As `make_partition`, added to those made; runs that divide alike share arrays."""
    groups = str(config.data), str(config.groups), str(config.partition)
    key = config.seed, config.num_clients, *groups
    if key not in made:
        arrays = (array for each in made.values() for array in each)
        taken = sum(array.nbytes for array in arrays) / 1e9
        made[key] = make_partition(config, data, taken)
    return made[key]


def add_notes(error: UserError, notes: Sequence[str]) -> UserError:
    """The error with what is known about the data, which may be its reason."""
    return UserError("".join([str(error), *(f" ({note})" for note in notes)]))


def plan_run(
    config: ConfigDict, mesh: Mesh, made: dict[tuple, Partition] | None = None
) -> Plan:
    """Builds everything that a run needs on the host; touches only the data cache.

    Args:
      config: of the run.
      mesh: the devices.
      made: partitions of other runs, which this one takes or adds to.

    Raises:
      UserError: the config or the data do not allow this run.
    """
    check_config(config)
    data = load_copies_once(config)
    try:
        partition = make_partition_once(config, data, {} if made is None else made)
    except UserError as error:
        raise add_notes(error, data.notes) from None
    federation = make_federation(config, data, partition)
    program = build_program(config, data, federation, mesh)
    check_size(config, program.sizes.num_layers, program.sizes.num_experts)
    check_package(config)
    hyper = make_hyper(config)
    # Now, as the user's file of devices may have changed when the run ends.
    _, names = make_devices(config)
    return Plan(config, program, data, partition, federation, hyper, names)


def note_room(plan: Plan) -> list[str]:
    """A line where every client has to train an expert that it has no room for.

    It is of the devices as they are, before what the world takes from them.
    """
    program, config = plan.program, plan.config
    work = count_workload(plan.federation, program)
    capacity = count_capacity(plan.federation.devices, jnp.zeros(()), work)
    if program.strategy.silent or np.any(capacity > 0):
        return []
    return [
        f"{config.strategy}: no client has room for an expert, and each trains one all "
        f"the same (devices.model_scale={config.devices.model_scale:g}, "
        f"devices.deadline={config.devices.deadline:g})"
    ]


def set_chunk(program: Program, chunk: int) -> Program:
    """The program with so many clients vmapped at once on each device."""
    run = program.static.run._replace(client_chunk=chunk)
    return program._replace(static=program.static._replace(run=run))


def fit_chunk(wave: Wave) -> Wave:
    """The wave with as many clients at once as the memory limit allows its runs.

    A chunk that the config gives stays. As `cut` makes as few waves as it can, runs
    come before clients: both are vmapped, and fewer waves compile less.
    """
    program, run = wave.program, wave.plans[0].config.run
    if run.client_chunk or program.static.run.client_chunk == 1:
        return wave
    per_run = program.mesh.shape[CLIENTS]
    chunk = chunk_size(
        program.sizes.cohort_size, per_run, program.static.run.client_chunk
    )
    while True:
        program = set_chunk(program, chunk)
        parts = estimate(wave.plans, program)
        if chunk == 1 or memory.fits(parts, run.memory_limit_gb):
            return wave._replace(program=program)
        chunk = -(-chunk // 2)


def estimate(plans: list[Plan], program: Program) -> dict[str, float]:
    """Estimates the memory of runs that advance together, see `memory`."""
    widest = max(plans, key=lambda plan: plan.federation.index.shape[1])
    key = jax.random.key(0)
    state, frozen = jax.eval_shape(
        lambda k, h: init_state(k, h, program), key, widest.hyper
    )
    sizes, whole = program.sizes, program.strategy.every_expert
    whole |= program.model.parts is None  # run with all experts, and with those held
    evaluated = sizes.num_experts if whole else sizes.max_held
    forward = [
        count_activation_bytes(program.model, program.batch, count)
        for count in (sizes.max_held, evaluated)
    ]
    base = memory.count_base_experts(program.model) / sizes.num_experts
    return memory.estimate_memory(
        state,
        widest.federation.replace(frozen=frozen, base=shape_base(program.model)),
        program,
        training_bytes=2 * forward[0],
        evaluation_bytes=forward[1],
        num_runs=len(plans),
        gathered_bytes=(base * sizes.max_held, base * evaluated),
    )


def choose_devices(config: ConfigDict) -> int:
    """Devices of a run alone: as configured, else as many as have a client to train."""
    processes = jax.process_count()
    pooled = find_strategy(config.strategy).pooled
    most = 1 if pooled else -(-config.cohort_size // processes)
    return config.run.num_devices or processes * min(jax.local_device_count(), most)


def plan_waves(
    members: Sequence[Member], begun: Sequence[Sequence[str]] = ()
) -> list[Wave]:
    """Groups the members by compiled program and cuts groups into waves that fit.

    Args:
      members: the runs.
      begun: names of those that are a wave already, which stays as it is, whatever the
        memory limit.

    Raises:
      UserError: a member is not allowed, or one run alone needs too much memory.
    """
    made: dict[tuple, Partition] = {}
    plans = {
        name: plan_run(config, build_mesh(config.run.num_devices), made)
        for name, config in members
    }
    formed = [[(name, plans[name]) for name in names] for names in begun]
    formed = [group for group in formed if shares_program(group)]
    groups: dict[tuple, list[tuple[str, Plan]]] = {}
    taken = {name for group in formed for name, _ in group}
    for name, plan in plans.items():
        if name not in taken:
            groups.setdefault(program_key(plan), []).append((name, plan))
    cut_anew = [wave for group in groups.values() for wave in cut(group)]
    return [fit_chunk(wave) for wave in (*map(make_wave, formed), *cut_anew)]


def shares_program(group: list[tuple[str, Plan]]) -> bool:
    """Whether one compiled program can run these plans together."""
    return len({program_key(plan) for _, plan in group}) == 1


def program_key(plan: Plan) -> tuple:
    """Equal for plans that one compiled program can run together."""
    static = plan.program._replace(strategy=traits(plan.program.strategy))
    schedule = tuple(str(plan.config[name]) for name in SCHEDULE)
    tests = plan.federation.own_test is not None
    return static, schedule, tests


def cut(group: list[tuple[str, Plan]]) -> list[Wave]:
    """As few waves as the memory limit allows; the last may be smaller.

    Raises:
      UserError: one run alone needs too much memory.
    """
    run = group[0][1].config.run
    limit = run.memory_limit_gb

    def least(wave: Wave) -> dict[str, float]:
        program = wave.program if run.client_chunk else set_chunk(wave.program, 1)
        return estimate(wave.plans, program)

    for count in range(1, len(group) + 1):
        size = math.ceil(len(group) / count)
        waves = [make_wave(group[i : i + size]) for i in range(0, len(group), size)]
        needed = [least(wave) for wave in waves]
        if size == 1 or all(memory.fits(parts, limit) for parts in needed):
            break
    for parts in needed:
        memory.check_memory(parts, limit)
    return waves


def make_wave(group: list[tuple[str, Plan]]) -> Wave:
    """A wave on the mesh that suits its number of runs.

    As many devices work on different runs as divide both numbers, and several share
    the clients of one run. Several processes share the clients of every run.
    """
    names, plans = [name for name, _ in group], [plan for _, plan in group]
    devices = plans[0].program.mesh.size
    along = math.gcd(devices, len(plans)) if jax.process_count() == 1 else 1
    if along == 1:
        devices = choose_devices(plans[0].config)
    else:
        devices = along * min(devices // along, plans[0].program.sizes.cohort_size)
    strategies = tuple(dict.fromkeys(plan.config.strategy for plan in plans))
    program = plans[0].program
    strategy = program.strategy._replace(assign=either(strategies))
    program = program._replace(strategy=strategy, mesh=build_mesh(devices, along))

    def number(plan: Plan) -> Plan:
        choice = np.int32(strategies.index(plan.config.strategy))
        return plan._replace(hyper=plan.hyper._replace(strategy=choice))

    return Wave(names, [number(plan) for plan in plans], program)
