"""Many runs as one program: seeds x traced hyperparameters x strategies.

Runs that differ only in their seed, in `Hyper` and in a strategy of equal sizes share
one compiled program with a leading S axis, over the mesh axis `runs`. Runs that differ
in anything static form another group. A group whose memory is beyond the limit is cut
into waves. Each wave is driven, checkpointed and resumed like one run, and every run
gets the folder that it would have had alone.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fedmoe_jax.evaluate import build_evaluate_share
from fedmoe_jax.program import Program
from fedmoe_jax.round import scan_rounds
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.sharding import RUNS, build_mesh, map_runs, place, spread
from fedmoe_jax.state import init_state, prepare_state
from fedmoe_jax.strategies import either, traits
from fedmoe_jax.train.loop import Job
from fedmoe_jax.train.run import (
    Plan,
    choose_devices,
    claim_runs,
    estimate,
    memory,
    plan_run,
    run_job,
)
from fedmoe_jax.train.workdir import is_finished
from fedmoe_jax.types import PER_RUN, Array, Federation, Hyper, PyTree, SimState

# Fields of the config outside `Program` in which the runs of one wave must agree.
SCHEDULE = ("num_rounds", "eval_every", "checkpoint", "data", "run")

# How the fields of a wave's federation lie on the mesh.
FEDERATION_SPEC = Federation(
    **{
        name: P(RUNS) if name in PER_RUN else P()
        for name in Federation.__dataclass_fields__
    }
)


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


def sweep(
    members: list[Member],
    workdir: Path,
    waves: list[Wave],
    *,
    stop: Callable[[], bool],
    profile: bool,
) -> tuple[list[Path], bool]:
    """Runs or resumes every wave in turn.

    Args:
      members: the runs, in the order in which their folders are returned.
      workdir: `runs/NAME` is a run's folder, `checkpoints/WAVE` a wave's.
      waves: from `plan_waves`.
      stop: asked after every chunk of rounds; true saves and ends the sweep early.
      profile: whether to trace a few rounds of the first unfinished wave.

    Returns:
      The folders of the finished members, and whether all are finished.

    Raises:
      UserError: a folder holds another run.
    """
    folders = {member.name: workdir / "runs" / member.name for member in members}
    done = multihost.on_leader(lambda: [wave_finished(wave, folders) for wave in waves])
    left = [wave for wave, whole in zip(waves, done, strict=True) if not whole]
    for number, wave in enumerate(left, start=1):
        print(f"[{number}/{len(left)}] {describe(wave)}", flush=True)
        trace = workdir / "profile" if profile and number == 1 else None
        whole = run_wave(wave, folders, workdir, stop=stop, profile=trace)
        if not whole or (stop() and number < len(left)):
            break
    done = multihost.on_leader(
        lambda: [is_finished(folders[name], config) for name, config in members]
    )
    return list(itertools.compress(folders.values(), done)), all(done)


def wave_finished(wave: Wave, folders: dict[str, Path]) -> bool:
    """Whether every run of the wave is finished."""
    return all(
        is_finished(folders[name], plan.config)
        for name, plan in zip(wave.names, wave.plans, strict=True)
    )


def describe(wave: Wave) -> str:
    """What a wave is, on one line."""
    runs = f"{len(wave.names)} runs as one program" if wave.names[1:] else "one run"
    shape = dict(wave.program.mesh.shape)
    return f"{runs} on {shape['runs']} x {shape['clients']} devices (runs x clients)"


def plan_waves(members: list[Member]) -> list[Wave]:
    """Groups the members by compiled program and cuts groups into waves that fit.

    Raises:
      UserError: a member is not allowed, or one run alone needs too much memory.
    """
    groups: dict[tuple, list[tuple[str, Plan]]] = {}
    for name, config in members:
        plan = plan_run(config, build_mesh(config.run.num_devices))
        groups.setdefault(program_key(plan), []).append((name, plan))
    return [wave for group in groups.values() for wave in cut(group)]


def program_key(plan: Plan) -> tuple:
    """Equal for plans that one compiled program can run together."""
    static = plan.program._replace(strategy=traits(plan.program.strategy))
    schedule = tuple(str(plan.config[name]) for name in SCHEDULE)
    return static, schedule


def cut(group: list[tuple[str, Plan]]) -> list[Wave]:
    """As few waves as the memory limit allows; the last may be smaller.

    Raises:
      UserError: one run alone needs too much memory.
    """
    limit = group[0][1].config.run.memory_limit_gb
    for count in range(1, len(group) + 1):
        size = math.ceil(len(group) / count)
        waves = [make_wave(group[i : i + size]) for i in range(0, len(group), size)]
        needed = [estimate(wave.plans, wave.program) for wave in waves]
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


def run_wave(
    wave: Wave,
    folders: dict[str, Path],
    workdir: Path,
    *,
    stop: Callable[[], bool],
    profile: Path | None,
) -> bool:
    """Runs or resumes one wave; returns whether it is finished."""
    own = [folders[name] for name in wave.names]
    claim_runs(wave.plans, own)
    checkpoints = workdir / "checkpoints" / wave_name(wave)
    job = build_wave_job(wave, own)
    return run_job(job, wave.plans, checkpoints, stop=stop, profile=profile)


def wave_name(wave: Wave) -> str:
    """Names a wave by its members, so that another division starts afresh."""
    digest = hashlib.sha256("\n".join(wave.names).encode()).hexdigest()
    return f"{wave.names[0]}-and-{len(wave.names) - 1}-{digest[:8]}"


def build_wave_job(wave: Wave, folders: list[Path]) -> Job:
    """Puts a wave on its devices, ready for the driver."""
    mesh, program = wave.program.mesh, wave.program
    hypers = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(p.hyper for p in wave.plans)
    )
    hypers = place(hypers, mesh, P(RUNS))
    seeds = np.array([plan.config.seed for plan in wave.plans])
    init, run_rounds, evaluate = build_programs(program)
    federation = stack_federations([p.federation for p in wave.plans], mesh)
    state, frozen = init(place(seeds, mesh, P(RUNS)), federation, hypers)
    federation = federation.replace(frozen=frozen)
    return Job(
        names=wave.names,
        folders=folders,
        state=state,
        inputs=(federation, hypers),
        frozen=program.strategy.frozen,
        run_rounds=run_rounds,
        evaluate=evaluate,
        split=split_runs,
    )


def stack_federations(federations: list[Federation], mesh: Mesh) -> Federation:
    """One federation for all runs, on the devices: `PER_RUN` fields have an S axis.

    Index rows get the length of the longest; no draw depends on it.
    """
    longest = max(federation.index.shape[1] for federation in federations)
    padded = [
        f.replace(index=np.pad(f.index, ((0, 0), (0, longest - f.index.shape[1]))))
        for f in federations
    ]
    own = {
        name: jax.tree.map(
            lambda *leaves: np.stack(leaves), *(getattr(f, name) for f in padded)
        )
        for name in PER_RUN
    }
    return Federation(
        **{
            name: place(
                own.get(name, getattr(federations[0], name)),
                mesh,
                getattr(FEDERATION_SPEC, name),
            )
            for name in Federation.__dataclass_fields__
        }
    )


@functools.cache
def build_programs(program: Program) -> tuple[Callable, Callable, Callable]:
    """Jitted init, run_rounds and evaluate of runs that share a program.

    All have a leading S axis on state, hyperparameters, the federation's `PER_RUN`
    fields and their results.
    """
    runs, mesh = P(RUNS), program.mesh

    def init_run(
        seed: Array, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, PyTree]:
        state, frozen = init_state(jax.random.key(seed), hyper, program)
        federation = federation.replace(frozen=frozen)
        return prepare_state(state, federation, hyper, program)

    divided = (runs, FEDERATION_SPEC, runs)
    over_runs = lambda function: spread(map_runs(function), mesh, divided, runs)
    return (
        jax.jit(over_runs(init_run)),
        jax.jit(over_runs(scan_rounds(program)), donate_argnums=0),
        jax.jit(over_runs(build_evaluate_share(program))),
    )


def split_runs(tree: PyTree) -> list[PyTree]:
    """A pytree of arrays with a leading S axis as S pytrees."""
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]
