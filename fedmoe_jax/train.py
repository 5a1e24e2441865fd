"""The driver of one run: a straight line from a config to a finished run folder."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax import checkpoint, experiment, memory
from fedmoe_jax.config import FREE_FIELDS, validate
from fedmoe_jax.data import load_dataset
from fedmoe_jax.evaluate import build_evaluate
from fedmoe_jax.files import read_json, write_json
from fedmoe_jax.metrics import (
    ACCURACIES,
    Row,
    open_metrics,
    open_progress,
    read_metrics,
)
from fedmoe_jax.partition import load_partition, save_partition
from fedmoe_jax.round import believe_capacity, build_run_rounds
from fedmoe_jax.setup import Setup, init_state
from fedmoe_jax.sharding import build_mesh, replicate
from fedmoe_jax.summary import make_summary
from fedmoe_jax.types import Dataset, Federation, Hyper, Partition, SimState, UserError


class Parts(NamedTuple):
    """What a run is made of, ready on the devices.

    Attributes:
      setup: static parts.
      data: the data set on the host.
      partition: who owns what.
      federation: what a round reads, replicated.
      hyper: traced hyperparameters, replicated.
      state: the state before the first round, replicated.
    """

    setup: Setup
    data: Dataset
    partition: Partition
    federation: Federation
    hyper: Hyper
    state: SimState


load_dataset_once = functools.cache(load_dataset)
init_state_compiled = jax.jit(init_state, static_argnums=2)


def build_parts(config: ConfigDict) -> Parts:
    """Builds everything a run needs and touches no disk but the data cache.

    Raises:
      UserError: the config, the data or the machine do not allow this run.
    """
    validate(config)
    data = load_dataset_once(config.data.name, config.data.dir)
    mesh = build_mesh(config.run.num_devices)
    partition = experiment.make_partition(config, data)
    image_shape = data.train_x.shape[1:]
    setup = experiment.build_setup(config, len(data.label_names), image_shape, mesh)
    federation = experiment.make_federation(config, data, partition)
    hyper = experiment.make_hyper(config)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(lambda k, h: init_state(k, h, setup), key, hyper)
    activations = experiment.count_activation_bytes(
        setup.model, image_shape, setup.sizes.max_held
    )
    needed = memory.estimate_memory(shapes, federation, setup, activations)
    memory.check_memory(needed, config.run.memory_limit_gb)
    hyper = replicate(hyper, mesh)
    return Parts(
        setup=setup,
        data=data,
        partition=partition,
        federation=replicate(federation, mesh),
        hyper=hyper,
        state=replicate(init_state_compiled(key, hyper, setup), mesh),
    )


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the work folder this run's own, or checks that it already is.

    Raises:
      UserError: the folder cannot be written or holds another run.
    """
    recorded = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if recorded.exists():
            check_same_run(read_json(recorded), config)
        elif (workdir / "metrics.jsonl").exists() or (workdir / "checkpoints").exists():
            raise UserError(
                f"workdir={workdir} holds a run without its config.json; "
                "allowed: a new folder, or one with the run to resume"
            )
        if not os.access(workdir, os.W_OK):
            raise PermissionError("not writable")
        write_json(recorded, config.to_dict())
    except OSError as error:
        raise UserError(
            f"workdir={workdir} cannot be used ({error.strerror or error}); "
            "allowed: a folder that can be written"
        ) from None


def check_same_run(saved: dict[str, Any], config: ConfigDict) -> None:
    """Checks that `config` continues the run whose `config.json` was read.

    Raises:
      UserError: a field differs that may not, or the run would become shorter.
    """
    checkpoint.check_config(saved, config.to_dict(), FREE_FIELDS)
    if config.num_rounds < saved["num_rounds"]:
        raise UserError(
            f"num_rounds={config.num_rounds} is not allowed; allowed: at least "
            f"{saved['num_rounds']}, what the run in this folder was started with"
        )


def keep_partition(path: Path, partition: Partition) -> None:
    """Saves who owns what, or checks that it is what the run was started with.

    Raises:
      UserError: the run in this folder was started with another partition.
    """
    if not path.exists():
        save_partition(path, partition)
        return
    saved = load_partition(path)
    if not all(map(np.array_equal, saved, partition)):
        raise UserError(
            f"{path} is not the partition that this config and data give; allowed: the "
            "data and NumPy version that the run was started with, or a new workdir"
        )


def make_rows(
    metrics: dict[str, np.ndarray], done: int, seconds: float, accuracies: Row
) -> list[Row]:
    """One row per round of a chunk; the last one carries the evaluation.

    Args:
      metrics: arrays with a leading R axis.
      done: rounds done at the end of the chunk.
      seconds: wall time of the chunk.
      accuracies: results of the evaluation, or empty.
    """
    rounds = len(metrics["train_loss"])
    rows = [
        {"round": done - rounds + 1 + r, "seconds": seconds / rounds}
        | {name: values[r] for name, values in metrics.items()}
        for r in range(rounds)
    ]
    rows[-1] |= accuracies
    return rows


def save_arrays(
    path: Path, parts: Parts, state: SimState, specialisation: np.ndarray
) -> None:
    """Writes `final.npz`, the arrays that the report draws."""
    capacity = believe_capacity(parts.federation, parts.hyper, parts.setup)
    part = path.with_suffix(".part.npz")
    np.savez(
        part,
        fitness=state.align.fitness,
        times_held=state.align.times_held,
        capacity=capacity,
        tier=parts.federation.devices.tier,
        label_counts=parts.partition.label_counts,
        specialisation=specialisation,
        label_names=np.array(parts.data.label_names),
    )
    part.replace(path)


def train(
    config: ConfigDict, workdir: Path, *, stop: Callable[[], bool], label: str
) -> bool:
    """Runs or resumes one run; returns whether it is finished.

    Args:
      config: the run's config.
      workdir: its folder; see the README for what is written there.
      stop: asked after every chunk of rounds; true saves and ends the run early.
      label: what progress calls the run.

    Raises:
      UserError: a mistake in config, data, folder or checkpoint; a bad config leaves
        no trace on disk.
    """
    parts = build_parts(config)
    setup = parts.setup
    claim_workdir(workdir, config)
    keep_partition(workdir / "partition.npz", parts.partition)
    evaluate = build_evaluate(
        model=setup.model,
        sizes=setup.sizes,
        gate_mode=setup.rules.gate_mode,
        mesh=setup.mesh,
    )
    state, done = run_to_end(config, workdir, parts, evaluate, stop=stop, label=label)
    if done < config.num_rounds:
        return False
    finish(config, workdir, parts, state, evaluate)
    return True


def run_to_end(
    config: ConfigDict,
    workdir: Path,
    parts: Parts,
    evaluate: Callable,
    *,
    stop: Callable[[], bool],
    label: str,
) -> tuple[SimState, int]:
    """Restores what there is and runs the rounds that are left.

    Rows are written before the state is saved, so that a killed run has a row for every
    round of its newest checkpoint.

    Returns:
      The state and the rounds done, fewer than configured if `stop` said so.
    """
    folder, total = workdir / "checkpoints", config.num_rounds
    board = config.run.tensorboard
    run_rounds = build_run_rounds(parts.setup)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(
            checkpoint.open_checkpoints(folder, config.checkpoint.keep)
        )
        state, done = checkpoint.restore_latest(store, parts.state) or (parts.state, 0)
        write = stack.enter_context(open_metrics(workdir, done=done, tensorboard=board))
        update = stack.enter_context(
            open_progress(total, label, done=done, stream=sys.stdout)
        )
        stopping = False
        if done < total:  # what a shorter run has left behind holds no longer
            (workdir / "summary.json").unlink(missing_ok=True)
        while done < total and not stopping:
            state, rows = advance(state, parts, run_rounds, evaluate, config, done)
            done = rows[-1]["round"]
            for row in rows:
                write(row)
            update(rows[-1])
            stopping = stop()
            due = done % config.checkpoint.every == 0
            if due or stopping or done >= total:
                checkpoint.save(store, done, state)
    return state, done


def advance(
    state: SimState,
    parts: Parts,
    run_rounds: Callable,
    evaluate: Callable,
    config: ConfigDict,
    done: int,
) -> tuple[SimState, list[Row]]:
    """One compiled chunk of rounds, evaluated where it is due."""
    start = time.monotonic()
    state, metrics = run_rounds(state, parts.federation, parts.hyper)
    metrics = jax.device_get(metrics)
    seconds = time.monotonic() - start
    done += config.chunk_rounds
    accuracies = {}
    if done % config.eval_every == 0:
        start = time.monotonic()
        results = jax.device_get(evaluate(state, parts.federation))
        accuracies = {name: results[name] for name in (*ACCURACIES, "expert_accuracy")}
        accuracies["evaluation_seconds"] = time.monotonic() - start
    return state, make_rows(metrics, done, seconds, accuracies)


def finish(
    config: ConfigDict,
    workdir: Path,
    parts: Parts,
    state: SimState,
    evaluate: Callable,
) -> None:
    """Writes `summary.json` and `final.npz` of a finished run."""
    results = jax.device_get(evaluate(state, parts.federation))
    rows = read_metrics(workdir / "metrics.jsonl")
    save_arrays(workdir / "final.npz", parts, state, results["specialisation"])
    note = parts.setup.strategy.note
    summary = make_summary(config.strategy, config.seed, note, rows)
    write_json(workdir / "summary.json", summary)
