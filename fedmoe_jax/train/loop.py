"""The loop on the host: compiled chunks of rounds, evaluation, rows, checkpoints."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from fedmoe_jax.measures import MEASURES, evaluated_fields
from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import Row
from fedmoe_jax.runtime import multihost
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train.writers import open_metrics, open_progress
from fedmoe_jax.types import PyTree, SimState

PROFILED_CHUNKS = 3

_compiled: dict[tuple, Callable] = {}


def ignore_row(row: Row) -> None:
    """For callers that read the rows from disk."""


class Job(NamedTuple):
    """What one loop advances: a run, or the runs of a sweep that share a program.

    Attributes:
      names: what progress calls the runs.
      folders: where each run's rows go; None for a run that is not kept on disk.
      state: the state before the first round, on the devices.
      inputs: the federation and the hyperparameters, on the devices.
      frozen: the parts in `federation.frozen` that the runs froze themselves.
      run_rounds: jitted (state, *inputs) -> (state, metrics), R rounds.
      evaluate: jitted (state, *inputs) -> accuracies.
      split: takes metrics on the host apart, one dict for each run.
      on_row: called with every row of every run, as `metrics.jsonl` has it.
    """

    names: list[str]
    folders: list[Path | None]
    state: SimState
    inputs: tuple[PyTree, PyTree]
    frozen: tuple[str, ...]
    run_rounds: Callable
    evaluate: Callable
    split: Callable[[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]
    on_row: Callable[[Row], None] = ignore_row


def compile_once(function: Callable, *arguments: PyTree) -> tuple[Callable, float]:
    """The jitted `function`, compiled for such arguments, and the seconds it took.

    Later calls with equal shapes and shardings get the same program in no time. The
    program refuses anything else, so that no round is ever compiled by surprise.
    """
    leaves, tree = jax.tree.flatten(arguments)
    specs = tuple((leaf.shape, str(leaf.dtype), leaf.sharding) for leaf in leaves)
    start = time.monotonic()
    key = (function, tree, specs)
    if key not in _compiled:
        _compiled[key] = function.lower(*arguments).compile()
    return _compiled[key], time.monotonic() - start


def make_rows(metrics: dict[str, np.ndarray], done: int, extra: Row) -> list[Row]:
    """One row per round of a chunk.

    Args:
      metrics: of one run, arrays with a leading R axis.
      done: rounds done at the end of the chunk.
      extra: further fields of the last row, of evaluation say.
    """
    rounds = len(metrics["train_loss"])
    rows = [
        {"round": done - rounds + 1 + r} | {k: v[r] for k, v in metrics.items()}
        for r in range(rounds)
    ]
    rows[-1] |= extra
    return rows


class Clock(NamedTuple):
    """Seconds of one chunk; a run's share where several advance together."""

    seconds: float
    evaluation_seconds: float


def advance(
    job: Job, programs: tuple[Callable, Callable], state: SimState, evaluated: bool
) -> tuple[SimState, list[dict], list[dict], Clock]:
    """One compiled chunk of rounds, and its evaluation where that is due.

    Returns:
      The state, each run's metrics [R, ...], each run's accuracies, and the time.
    """
    run_rounds, evaluate = programs
    runs = len(job.names)
    start = time.monotonic()
    state, metrics = run_rounds(state, *job.inputs)
    metrics = job.split(jax.device_get(metrics))
    trained = time.monotonic()
    accuracies = [{} for _ in job.names]
    if evaluated:
        accuracies = job.split(jax.device_get(evaluate(state, *job.inputs)))
    clock = Clock((trained - start) / runs, (time.monotonic() - trained) / runs)
    return state, metrics, accuracies, clock


def list_rows(
    config: ConfigDict,
    done: int,
    metrics: list[dict],
    accuracies: list[dict],
    clock: Clock,
    spent: Row,
) -> list[list[Row]]:
    """Every run's rows of one chunk; `spent` are times spent before the chunk."""
    seconds = np.full(config.chunk_rounds, clock.seconds / config.chunk_rounds)
    rows = []
    for measured, found in zip(metrics, accuracies, strict=True):
        names = evaluated_fields(MEASURES)
        extra = {name: found[name] for name in names if name in found}
        if found:
            extra["evaluation_seconds"] = clock.evaluation_seconds
        rows.append(make_rows({"seconds": seconds} | measured, done, extra | spent))
    return rows


def drive(
    config: ConfigDict,
    job: Job,
    checkpoints: Path | None,
    *,
    stop: Callable[[], bool],
    profile: Path | None,
) -> tuple[SimState, int, Row]:
    """Restores what there is and runs the rounds that are left.

    Rows are written before the state is saved, so that a killed run has a row for every
    round of its newest checkpoint.

    Args:
      config: rounds, evaluation, checkpoints; of any of the runs.
      job: what to run.
      checkpoints: their folder; None to restore and save nothing.
      stop: asked after every chunk of rounds; true saves and ends the loop early.
      profile: where a trace of a few chunks goes, or None.

    Returns:
      The state, the rounds done, fewer than configured if `stop` said so, and the time
      that is in no row: of the last save, a run's share.
    """
    total = config.num_rounds
    with contextlib.ExitStack() as stack:
        store, restored = None, None
        if checkpoints:
            keep = config.checkpoint.keep
            store = stack.enter_context(checkpoint.open_checkpoints(checkpoints, keep))
            restored = multihost.run_on_all(checkpoint.restore_latest, store, job.state)
        state, done = restored or (job.state, 0)
        write = stack.enter_context(open_writers(config, job, done))
        if done >= total:
            return state, done, {}
        if done and multihost.is_leader():
            print(f"going on after round {done}/{total}", flush=True)
        programs, spent = compile_programs(job, state)
        update = stack.enter_context(
            open_progress(total, job.names, done=done, stream=sys.stdout)
        )
        trace = stack.enter_context(open_trace(profile, config, done))
        while True:
            trace(done)
            done += config.chunk_rounds
            evaluated = done % config.eval_every == 0
            state, *measured = advance(job, programs, state, evaluated)
            rows = list_rows(config, done, *measured, spent)
            write(rows)
            update([run_rows[-1] for run_rows in rows])
            last, spent = stop() or done >= total, {}
            if store and (last or done % config.checkpoint.every == 0):
                spent = save(store, done, state, len(job.names))
            if last:
                return state, done, spent


def settle_frozen(job: Job, checkpoints: Path) -> Job:
    """The job with the parts that its runs froze when they were started.

    They are no part of the state, so they are saved once, beside the checkpoints; a
    resumed run must not depend on training them again to the last bit.

    Raises:
      UserError: there are checkpoints, and no intact frozen parts.
    """
    if not job.frozen:
        return job
    federation, hyper = job.inputs
    own = {part: federation.frozen[part] for part in job.frozen}
    folder, has_steps = checkpoints / "frozen", checkpoint.has_steps
    begun, kept = multihost.on_leader(lambda: [*map(has_steps, (checkpoints, folder))])
    if begun and not kept:
        raise UserError(
            f"{folder} is missing, which the checkpoints beside it need; remove "
            f"{checkpoints} to start again from round 0"
        )
    with checkpoint.open_checkpoints(folder, keep=1) as store:
        if kept:
            own, _ = multihost.run_on_all(checkpoint.restore_latest, store, own)
        else:
            checkpoint.save(store, 0, own)
    federation = federation.replace(frozen=federation.frozen | own)
    return job._replace(inputs=(federation, hyper))


@contextlib.contextmanager
def open_writers(
    config: ConfigDict, job: Job, done: int
) -> Iterator[Callable[[list[list[Row]]], None]]:
    """Yields `write(rows)`, which appends every run's rows; only the leader writes."""
    with contextlib.ExitStack() as stack:
        board = config.run.tensorboard
        writers = [
            stack.enter_context(open_metrics(folder, done=done, tensorboard=board))
            for folder in job.folders
            if multihost.is_leader()
        ]

        def write(rows: list[list[Row]]) -> None:
            for writer, run_rows in zip(writers, rows, strict=multihost.is_leader()):
                for row in run_rows:
                    job.on_row(writer(row))

        yield write


@contextlib.contextmanager
def open_trace(
    folder: Path | None, config: ConfigDict, done: int
) -> Iterator[Callable[[int], None]]:
    """Yields `trace(done)`, called before every chunk: it traces a few of them.

    The first chunk of a process is not like the others, so it is left out if there are
    more. TensorBoard and Perfetto read the trace.
    """
    left = (config.num_rounds - done) // config.chunk_rounds
    first = done + (config.chunk_rounds if left > 1 else 0)
    end = first + PROFILED_CHUNKS * config.chunk_rounds
    with contextlib.ExitStack() as tracing:

        def trace(done: int) -> None:
            if folder is not None and done == first:
                tracing.enter_context(
                    jax.profiler.trace(str(folder), create_perfetto_trace=True)
                )
            if done == end:
                tracing.close()

        yield trace


def save(
    store: CheckpointManager, done: int, state: SimState, runs: int
) -> dict[str, float]:
    """Starts saving the state; the seconds that it took, a run's share."""
    start = time.monotonic()
    checkpoint.save(store, done, state)
    return {"save_seconds": (time.monotonic() - start) / runs}


def compile_programs(job: Job, state: SimState) -> tuple[tuple, Row]:
    """Both programs of a job and the time that compiling took, a run's share."""
    run_rounds, first = compile_once(job.run_rounds, state, *job.inputs)
    evaluate, second = compile_once(job.evaluate, state, *job.inputs)
    seconds = (first + second) / len(job.names)
    return (run_rounds, evaluate), {"compile_seconds": seconds}
