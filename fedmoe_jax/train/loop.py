"""The loop on the host: compiled chunks of rounds, evaluation, rows, checkpoints."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from fedmoe_jax.disclosure import observed
from fedmoe_jax.disclosure.observer import OBSERVED
from fedmoe_jax.measures import MEASURES, evaluated_fields
from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import Row
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.origin import find_origin
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train.checkpoint import Found
from fedmoe_jax.train.origins import record_origin
from fedmoe_jax.train.trace import open_trace
from fedmoe_jax.train.writers import (
    check_metrics,
    open_metrics,
    open_progress,
    sync_metrics,
)
from fedmoe_jax.types import Array, PyTree, SimState

# Linux allows a process 65,530 memory maps; a compiled round takes up to 3,000.
PROGRAMS_KEPT = 4  # of a run: its first state, its rounds and its evaluation

_pool = ThreadPoolExecutor(thread_name_prefix="compile")  # XLA compiles several at once
_compiled: dict[tuple, Future[Callable]] = {}


def ignore_row(row: Row) -> None:
    """For callers that read the rows from disk."""


def ignore_observed(arrays: dict[str, np.ndarray]) -> None:
    """For callers that read what was observed from disk."""


class Programs(NamedTuple):
    """The jitted functions of a loop, all with a leading S axis for its runs.

    Attributes:
      run_rounds: (state, federation, hyper) -> (state, metrics), R rounds.
      evaluate: (state, federation, hyper) -> accuracies.
      finetune: (state, federation, hyper, client values [S, V, N]) -> accuracies after
        one more local round, of the last evaluation; None without.
      stages: (rounds, (state, federation, hyper) -> (state, frozen)), each run once so
        many rounds are done.
      expose: (state, federation, hyper) -> losses of the clients' examples at the end
        of an observed run, see `exposure`; None without.
    """

    run_rounds: Callable
    evaluate: Callable
    finetune: Callable | None
    stages: tuple[tuple[int, Callable], ...]
    expose: Callable | None = None


class Job(NamedTuple):
    """The runs that one loop advances; they share a program.

    Attributes:
      names: what progress calls the runs.
      folders: where each run's rows go; None for a run that is not kept on disk.
      state: the state before the first round, on the devices.
      inputs: the federation and the hyperparameters, on the devices.
      frozen: the parts in `federation.frozen` that the runs froze themselves.
      programs: the compiled functions.
      split: takes metrics on the host apart, one dict for each run.
      compile_seconds: spent on compiling so far, of all runs together.
      on_row: called with every row of every run, as `metrics.jsonl` has it.
      on_observed: called with what was observed of each run in each chunk, leaves
        [R, ...], where it is observed.
    """

    names: list[str]
    folders: Sequence[Path | None]
    state: SimState
    inputs: tuple[PyTree, PyTree]
    frozen: tuple[str, ...]
    programs: Programs
    split: Callable[[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]
    compile_seconds: float = 0.0
    on_row: Callable[[Row], None] = ignore_row
    on_observed: Callable[[dict[str, np.ndarray]], None] = ignore_observed


class End(NamedTuple):
    """The end of a loop.

    Attributes:
      state: the newest state.
      inputs: the federation, with what the runs have frozen, and hyperparameters.
      done: rounds done, fewer than configured if `stop` said so.
      spent: seconds that are in no row, of the last save, a run's share.
    """

    state: SimState
    inputs: tuple[PyTree, PyTree]
    done: int
    spent: Row


def compile_ahead(
    functions: Sequence[Callable], *arguments: PyTree
) -> list[Future[Callable]]:
    """Starts compiling the jitted `functions` for such arguments; see `compile_once`.

    Args:
      functions: the slowest to compile first.
      arguments: arrays, or `jax.ShapeDtypeStruct` with their shardings.
    """
    leaves, tree = jax.tree.flatten(arguments)
    specs = tuple(map(describe_leaf, leaves))
    keys = [(function, tree, specs) for function in functions]
    for key in keys:
        known = _compiled.pop(key, None)
        if known and known.done() and known.exception():
            known = None  # memory may have been short then
        # Programs are traced one after the other, while those before them compile.
        _compiled[key] = known or _pool.submit(key[0].lower(*arguments).compile)
    programs = [_compiled[key] for key in keys]
    for key in [*_compiled][: -3 * PROGRAMS_KEPT]:
        del _compiled[key]
    return programs


def describe_leaf(leaf: Array | jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """Shape, dtype and part on each device, equal where shardings differ by name."""
    parts = leaf.sharding.devices_indices_map(leaf.shape)
    return str(leaf.shape), str(leaf.dtype), str(parts)


def compile_once(
    functions: Sequence[Callable], *arguments: PyTree
) -> tuple[list[Callable], float]:
    """The jitted `functions`, compiled for such arguments, and the seconds it took.

    Later calls with equal shapes and shardings get the same programs in no time, unless
    others came between. A program refuses anything else, so that no round is ever
    compiled by surprise.
    """
    start = time.monotonic()
    programs = [program.result() for program in compile_ahead(functions, *arguments)]
    return programs, time.monotonic() - start


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
    job: Job,
    programs: tuple[Callable, Callable],
    state: SimState,
    inputs: tuple[PyTree, PyTree],
    evaluated: bool,
    last: bool,
) -> tuple[SimState, list[dict], list[dict], Clock]:
    """One compiled chunk of rounds, and its evaluation where that is due.

    The `last` rounds of a run are evaluated after fine-tuning, too.

    Returns:
      The state, each run's metrics [R, ...], each run's accuracies, and the time.
    """
    run_rounds, evaluate = programs
    runs = len(job.names)
    start = time.monotonic()
    state, metrics = run_rounds(state, *inputs)
    metrics = job.split(jax.device_get(metrics))
    trained = time.monotonic()
    accuracies = [{} for _ in job.names]
    if evaluated:
        found = evaluate(state, *inputs)
        accuracies = job.split(jax.device_get(found))
        if last and (tune := job.programs.finetune):
            names = ("client_accuracy", "client_bits")
            values = jnp.stack([found[name] for name in names if name in found], axis=1)
            (tune,), _ = compile_once([tune], state, *inputs, values)
            tuned = tune(state, *inputs, values)
            tuned = job.split(jax.device_get(tuned))
            accuracies = [a | b for a, b in zip(accuracies, tuned, strict=True)]
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
) -> End:
    """Restores what there is and runs the rounds that are left.

    Rows are on disk before the state is saved, so that a killed run has a row for every
    round of its newest checkpoint.

    Args:
      config: rounds, evaluation, checkpoints; of any of the runs.
      job: what to run.
      checkpoints: their folder; None to restore and save nothing.
      stop: asked before the first chunk of rounds and after every one; true saves and
        ends the loop early.
      profile: where a trace of a few chunks goes, or None.

    Raises:
      UserError: no checkpoint is intact, they fit another run, rows are missing, or
        what must be kept cannot be written.
    """
    total, inputs = config.num_rounds, job.inputs
    with contextlib.ExitStack() as stack:
        keep = config.checkpoint.keep
        found, store = stack.enter_context(open_store(job, checkpoints, keep))
        state, done = found.state, found.step
        multihost.on_leader(check_rows, job, found)
        if config.privacy.observe:
            multihost.on_leader(resume_observed, config, job, done)
        write = stack.enter_context(open_writers(config, job, done))
        if checkpoints and done:
            inputs = restore_frozen(job, checkpoints, done)
        if done >= total:
            return End(state, inputs, done, {})
        if done and multihost.is_leader():
            print(f"going on after round {done}/{total}", flush=True)
        state, inputs = run_stages(job, checkpoints, done, state, inputs)
        programs, spent = compile_programs(job, state, inputs)
        if stop():
            return End(state, inputs, done, {})
        multihost.on_leader(record_origins, job.folders, done)
        update = stack.enter_context(
            open_progress(total, job.names, done=done, stream=sys.stdout)
        )
        trace = stack.enter_context(open_trace(profile, config, done))
        while True:
            trace(done)
            done += config.chunk_rounds
            evaluated = done % config.eval_every == 0
            state, metrics, accuracies, clock = advance(
                job, programs, state, inputs, evaluated, done >= total
            )
            keep_observed(job, done, [run.pop(OBSERVED, None) for run in metrics])
            rows = list_rows(config, done, metrics, accuracies, clock, spent)
            update([run_rows[-1] for run_rows in write(rows)])
            last, spent = stop() or done >= total, {}
            if store and (last or done % config.checkpoint.every == 0):
                spent = save(store, done, state, job.folders)
            if last:
                return End(state, inputs, done, spent)
            state, inputs = run_stages(job, checkpoints, done, state, inputs)


@contextlib.contextmanager
def open_store(
    job: Job, checkpoints: Path | None, keep: int
) -> Iterator[tuple[Found, CheckpointManager | None]]:
    """Yields the newest intact checkpoint, or the first state, and all of them."""
    first = Found(job.state, 0, [])
    if checkpoints is None:
        yield first, None
        return
    with checkpoint.open_checkpoints(checkpoints, keep) as store:
        found = multihost.run_on_all(checkpoint.restore_latest, store, job.state)
        yield found or first, store


def check_rows(job: Job, found: Found) -> None:
    """Checks that every run has the rows that it had when its state was saved.

    Raises:
      UserError: rows are missing or others.
    """
    folders = [folder for folder in job.folders if folder is not None]
    digests = found.rows or [None] * len(folders)
    for folder, digest in zip(folders, digests, strict=True):
        check_metrics(folder, found.step, digest)


def resume_observed(config: ConfigDict, job: Job, done: int) -> None:
    """Checks what was observed of every run, and removes what comes after `done`.

    Raises:
      UserError: see `observed.resume`.
    """
    for folder in job.folders:
        if folder is not None:
            observed.resume(folder, done, config.chunk_rounds)


def keep_observed(
    job: Job, done: int, chunks: list[dict[str, np.ndarray] | None]
) -> None:
    """Writes what was observed of every run in a chunk; before its rows.

    So what a row is of has been kept. Only the leader writes.
    """
    if not multihost.is_leader():
        return
    for folder, arrays in zip(job.folders, chunks, strict=True):
        if arrays is not None:
            job.on_observed(arrays)
            if folder is not None:
                observed.write_chunk(folder, done, arrays)


def record_origins(folders: Sequence[Path | None], done: int) -> None:
    """Records that this process computes the rounds after the first `done`.

    Prints a line where rounds before them may have been computed differently.

    Raises:
      UserError: see `record_origin`.
    """
    other: set[str] = set()
    for folder in folders:
        if folder is not None:
            other |= record_origin(folder, done, find_origin())
    if other:
        names = ", ".join(sorted(other))
        print(
            f"rounds up to {done} were computed with another {names}, which may "
            "change numbers; origins.json has both",
            flush=True,
        )


def run_stages(
    job: Job,
    checkpoints: Path | None,
    done: int,
    state: SimState,
    inputs: tuple[PyTree, PyTree],
) -> tuple[SimState, tuple[PyTree, PyTree]]:
    """State and inputs after the stages that are due after `done` rounds.

    What they freeze is no part of the state, so it is saved beside the checkpoints: a
    resumed run must not depend on training it again to the last bit.
    """
    due = [act for when, act in job.programs.stages if when == done]
    for act in due:
        state, frozen = act(state, *inputs)
        inputs = inputs[0].replace(frozen=frozen), inputs[1]
    if due and job.frozen and checkpoints:
        own = {part: inputs[0].frozen[part] for part in job.frozen}
        with open_frozen(job, checkpoints) as store:
            if done not in store.all_steps():
                checkpoint.save(store, done, own)
    return state, inputs


def open_frozen(job: Job, checkpoints: Path) -> CheckpointManager:
    """The parts that runs have frozen, one step for each stage."""
    folder = checkpoints / "frozen"
    return checkpoint.open_checkpoints(folder, keep=len(job.programs.stages))


def restore_frozen(job: Job, checkpoints: Path, done: int) -> tuple[PyTree, PyTree]:
    """The job's inputs with the parts that its runs had frozen before round `done`.

    A checkpoint is older than the stage of its own round, which is run again.

    Raises:
      UserError: there are no intact ones.
    """
    federation, hyper = job.inputs
    past = [when for when, _ in job.programs.stages if when < done]
    if not job.frozen or not past:
        return job.inputs
    own, folder = {part: federation.frozen[part] for part in job.frozen}, "frozen"
    with open_frozen(job, checkpoints) as store:
        restore = checkpoint.restore_latest
        found = multihost.run_on_all(restore, store, own, max(past))
    if found is None or found.step < max(past):
        raise UserError(
            f"{checkpoints / folder} is missing, which the checkpoints beside it need; "
            f"remove {checkpoints} to start again from round 0"
        )
    frozen = federation.frozen | found.state
    return federation.replace(frozen=frozen), hyper


@contextlib.contextmanager
def open_writers(
    config: ConfigDict, job: Job, done: int
) -> Iterator[Callable[[list[list[Row]]], list[list[Row]]]]:
    """Yields `write(rows)`, which appends every run's rows; only the leader writes.

    It returns them as they are on disk, on other processes as they came.
    """
    with contextlib.ExitStack() as stack:
        board = config.run.tensorboard
        writers = [
            stack.enter_context(open_metrics(folder, done=done, tensorboard=board))
            for folder in job.folders
            if multihost.is_leader()
        ]

        def write(rows: list[list[Row]]) -> list[list[Row]]:
            if not multihost.is_leader():
                return rows
            written = [
                list(map(writer, run_rows))
                for writer, run_rows in zip(writers, rows, strict=True)
            ]
            for row in itertools.chain(*written):
                job.on_row(row)
            return written

        yield write


def save(
    store: CheckpointManager,
    done: int,
    state: SimState,
    folders: Sequence[Path | None],
) -> dict[str, float]:
    """Starts saving the state; the seconds that it took, a run's share.

    Args:
      store: the checkpoints.
      done: rounds done.
      state: of all runs.
      folders: of the runs.
    """
    start, rows = time.monotonic(), []
    if multihost.is_leader():
        rows = [sync_metrics(folder) for folder in folders if folder is not None]
    checkpoint.save(store, done, state, rows)
    return {"save_seconds": (time.monotonic() - start) / len(folders)}


def compile_programs(
    job: Job, state: SimState, inputs: tuple[PyTree, PyTree]
) -> tuple[tuple[Callable, Callable], Row]:
    """Both programs of a job and the time that compiling took, a run's share."""
    functions = job.programs.run_rounds, job.programs.evaluate
    (run_rounds, evaluate), seconds = compile_once(functions, state, *inputs)
    seconds += job.compile_seconds
    return (run_rounds, evaluate), {"compile_seconds": seconds / len(job.names)}
