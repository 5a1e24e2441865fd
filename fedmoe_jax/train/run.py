"""One run: a straight line from a config to a finished run folder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedmoe_jax.align.capacity import Belief
from fedmoe_jax.base import Data
from fedmoe_jax.config import validate
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.evaluate import build_evaluate
from fedmoe_jax.federation import make_devices, make_federation, make_partition
from fedmoe_jax.measures import MEASURES, pack_measures
from fedmoe_jax.models.flops import count_activation_bytes
from fedmoe_jax.program import Program, build_program, find_overwritten, make_hyper
from fedmoe_jax.report.rows import Row, read_metrics
from fedmoe_jax.report.summary import describe_speed, make_summary
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import write_json
from fedmoe_jax.runtime.origin import find_origin
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.state import init_state, prepare_state
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.train import memory
from fedmoe_jax.train.loop import Job, compile_once, drive, ignore_row, settle_frozen
from fedmoe_jax.train.workdir import claim_run, is_finished
from fedmoe_jax.types import AlignState, Federation, Hyper, Partition
from fedmoe_jax.world.participation import Participation


class Plan(NamedTuple):
    """One run as its config describes it, still on the host.

    Attributes:
      config: validated.
      program: static parts.
      data: the data set.
      partition: who owns what.
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


load_dataset_once = functools.cache(load_dataset)
init_state_compiled = jax.jit(init_state, static_argnums=2)
prepare_compiled = jax.jit(prepare_state, static_argnums=3)


def load_data(config: ConfigDict) -> None:
    """Loads the data set, so that it is there for whoever asks next.

    Raises:
      UserError: the config is not allowed or the data cannot be loaded.
    """
    validate(config)
    load_dataset_once(config.data.name, config.data.dir)


def plan_run(config: ConfigDict, mesh: Mesh) -> Plan:
    """Builds everything that a run needs on the host; touches only the data cache.

    Raises:
      UserError: the config or the data do not allow this run.
    """
    validate(config)
    data = load_dataset_once(config.data.name, config.data.dir)
    partition = make_partition(config, data)
    federation = make_federation(config, data, partition)
    program = build_program(config, data, federation, mesh)
    hyper = make_hyper(config)
    # Now, as the user's file of devices may have changed when the run ends.
    _, names = make_devices(config)
    return Plan(config, program, data, partition, federation, hyper, names)


def estimate(plans: list[Plan], program: Program) -> dict[str, float]:
    """Estimates the memory of runs that advance together, see `memory`."""
    widest = max(plans, key=lambda plan: plan.federation.index.shape[1])
    key = jax.random.key(0)
    state, frozen = jax.eval_shape(
        lambda k, h: init_state(k, h, program), key, widest.hyper
    )
    sizes = program.sizes
    evaluated = sizes.num_experts if program.strategy.every_expert else sizes.max_held
    forward = [
        count_activation_bytes(program.model, program.batch, count)
        for count in (sizes.max_held, evaluated)
    ]
    return memory.estimate_memory(
        state,
        widest.federation.replace(frozen=frozen),
        program,
        training_bytes=2 * forward[0],
        evaluation_bytes=forward[1],
        num_runs=len(plans),
    )


def choose_devices(config: ConfigDict) -> int:
    """Devices of a run alone: as configured, else as many as have a client to train."""
    processes = jax.process_count()
    pooled = find_strategy(config.strategy).pooled
    most = 1 if pooled else -(-config.cohort_size // processes)
    return config.run.num_devices or processes * min(jax.local_device_count(), most)


def plan_one(config: ConfigDict) -> Plan:
    """Plans a run that has all devices for itself.

    Raises:
      UserError: see `plan_run`; or it needs too much memory.
    """
    validate(config)
    plan = plan_run(config, build_mesh(choose_devices(config)))
    memory.check_memory(estimate([plan], plan.program), config.run.memory_limit_gb)
    return plan


def build_job(plan: Plan, workdir: Path | None, label: str) -> Job:
    """Puts one run on the devices, ready for the driver; see `Job.folders`."""
    program, mesh = plan.program, plan.program.mesh
    hyper = replicate(plan.hyper, mesh)
    key = jax.random.key(plan.config.seed)
    state, frozen = replicate(init_state_compiled(key, hyper, program), mesh)
    federation = replicate(plan.federation, mesh).replace(frozen=frozen)
    state, frozen = prepare_compiled(state, federation, hyper, program)
    federation = federation.replace(frozen=frozen)
    return Job(
        names=[label],
        folders=[workdir],
        state=state,
        inputs=(federation, hyper),
        frozen=program.strategy.frozen,
        run_rounds=build_run_rounds(program),
        evaluate=build_evaluate(program),
        split=lambda metrics: [metrics],
    )


def claim_runs(plans: list[Plan], folders: list[Path]) -> None:
    """Claims the folder of every run; all processes wait until the leader has.

    Raises:
      UserError: see `claim_run`; or the processes have different data.
    """
    what = "the data and their partition"
    multihost.check_equal(what, (plans[0].data, [plan.partition for plan in plans]))

    def claim() -> None:
        for plan, folder in zip(plans, folders, strict=True):
            claim_run(folder, plan.config, plan.partition)

    multihost.on_leader(claim)


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    stop: Callable[[], bool],
    label: str,
    profile: bool,
    on_row: Callable[[Row], None] = ignore_row,
) -> bool:
    """Runs or resumes one run; returns whether it is finished.

    Args:
      config: the run's config.
      workdir: its folder; see the README for what is written there.
      stop: asked after every chunk of rounds; true saves and ends the run early.
      label: what progress calls the run.
      profile: whether to trace a few rounds into `workdir/profile`.
      on_row: called with the row of every round that is run now.

    Raises:
      UserError: a mistake in config, data, folder or checkpoint; a bad config leaves
        no trace on disk.
    """
    multihost.on_leader(load_data, config)  # alone, as it may have to be prepared
    plan = multihost.run_on_all(plan_one, config)
    if multihost.on_leader(is_finished, workdir, config):
        print(f"{workdir} holds all {config.num_rounds} rounds already")
        return True
    claim_runs([plan], [workdir])
    job = build_job(plan, workdir, label)._replace(on_row=on_row)
    folder = workdir / "profile" if profile else None
    return run_job(job, [plan], workdir / "checkpoints", stop=stop, profile=folder)


def run_job(
    job: Job,
    plans: list[Plan],
    checkpoints: Path,
    *,
    stop: Callable[[], bool],
    profile: Path | None,
) -> bool:
    """Drives runs to their end and closes their folders; returns whether they are.

    Args:
      job: the runs on the devices.
      plans: of the same runs.
      checkpoints: folder of their checkpoints.
      stop: see `drive`.
      profile: see `drive`.
    """
    config, origin = plans[0].config, find_origin()
    job = settle_frozen(job, checkpoints)
    state, done, spent = drive(config, job, checkpoints, stop=stop, profile=profile)
    if done < config.num_rounds:
        return False
    evaluate, _ = compile_once(job.evaluate, state, *job.inputs)
    results = job.split(jax.device_get(evaluate(state, *job.inputs)))
    states = job.split(jax.device_get((state.align, state.belief, state.participation)))
    if multihost.is_leader():
        for parts in zip(plans, job.folders, states, results, strict=True):
            summary = finish(*parts, spent, origin)
        print(describe_speed(summary), flush=True)
    return True


def finish(
    plan: Plan,
    workdir: Path,
    state: tuple[AlignState, Belief, Participation],
    results: dict[str, np.ndarray],
    spent: Row,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Writes `summary.json` and `final.npz` of a finished run; returns the summary."""
    save_arrays(workdir / "final.npz", plan, *state, results["specialisation"])
    config, rows = plan.config, read_metrics(workdir / "metrics.jsonl")
    strategy = find_strategy(config.strategy)
    summary = {
        "strategy": config.strategy,
        "seed": config.seed,
        "note": strategy.about,
        "needs": strategy.needs,
        "reads": strategy.reads,
        "overwrites": find_overwritten(config),
        **make_summary(rows, spent, MEASURES),
        "made_by": origin,
        "measures": pack_measures(MEASURES),
    }
    write_json(workdir / "summary.json", summary)
    return summary


def drop_single(rows: np.ndarray) -> np.ndarray:
    """[N, G, E] as it is, or [N, E] where the model has one MoE layer."""
    return rows[:, 0] if rows.shape[1] == 1 else rows


def save_arrays(
    path: Path,
    plan: Plan,
    align: AlignState,
    belief: Belief,
    participation: Participation,
    specialisation: np.ndarray,
) -> None:
    """Writes `final.npz`, the arrays that the report draws."""
    part, num_layers = path.with_suffix(".part.npz"), len(specialisation)
    np.savez(
        part,
        fitness=drop_single(align.fitness),
        times_held=drop_single(align.times_held),
        capacity=np.minimum(participation.capacity, plan.program.sizes.max_capacity),
        belief=belief.capacity,
        tier=plan.federation.devices.tier,
        tier_names=np.array(plan.tier_names),
        participation=participation.rounds,
        last_client=participation.client,
        last_code=participation.outcome.code,
        last_phases=participation.outcome.phases,
        last_spent=participation.outcome.spent,
        label_counts=plan.partition.label_counts,
        specialisation=specialisation[0] if num_layers == 1 else specialisation,
        label_names=np.array(plan.data.stratum_names),
    )
    part.replace(path)
