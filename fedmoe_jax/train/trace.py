"""Traces of a few chunks of rounds, a convenience: one that fails ends no run."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from fedmoe_jax.runtime.files import brief

PROFILED_CHUNKS = 3


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
                tracing.enter_context(record(folder))
            if done == end:
                tracing.close()

        yield trace


@contextlib.contextmanager
def record(folder: Path) -> Iterator[None]:
    """Traces what runs inside into `folder`, made if need be.

    Where that fails there is a warning and nothing of the trace, as a half of it may
    have taken the room that checkpoints need.
    """
    earlier = list_traces(folder)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(str(folder), create_perfetto_trace=True)

    begun = attempt(begin, folder)
    try:
        yield
    finally:
        if begun and not attempt(jax.profiler.stop_trace, folder):
            for half in list_traces(folder) - earlier:
                shutil.rmtree(half, ignore_errors=True)


def list_traces(folder: Path) -> set[Path]:
    """The folders of traces that JAX has written into `folder`."""
    return set(folder.glob("plugins/profile/*"))


def attempt(act: Callable[[], None], folder: Path) -> bool:
    """Whether `act` has worked; a failure is warned of."""
    try:
        act()
    except Exception as error:  # the profiler has no common class for what fails
        print(f"warning: no trace in {folder} ({brief(error)})", file=sys.stderr)
        return False
    return True
