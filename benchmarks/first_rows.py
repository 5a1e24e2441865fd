"""Seconds from a launch to its first row and to its prompt, compiled and from cache.

    python -m benchmarks.first_rows

The first call of each pair finds the user's caches empty, the second what the first
has left there.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import page
from benchmarks.smoke import ROOT, count_cpu

REPETITIONS = 3
POLL_SECONDS = 0.02
LAUNCHES = {
    "`launch.py`": (),
    "`make demo`": ("--config=configs/compare.py:digits",),
}
HEADER = ("launch", "caches", "first row, s", "all, s", "CPU seconds")


class Launch(NamedTuple):
    """One launch, in seconds.

    Attributes:
      first_row: wall, from the call until a row of any run is on disk.
      seconds: wall, from the call to the prompt.
      cpu_seconds: of all its threads.
    """

    first_row: float
    seconds: float
    cpu_seconds: float


def has_row(workdir: Path) -> bool:
    """Whether any run of a work folder has written a row."""
    return any(path.stat().st_size for path in workdir.glob("**/metrics.jsonl"))


def time_launch(flags: tuple[str, ...], cache: str) -> Launch:
    """Times `launch.py` with these flags and a folder for all caches of the user.

    Raises:
      RuntimeError: it fails or writes no row.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir, first_row = Path(folder, "run"), None
        command = [sys.executable, "launch.py", *flags, f"--workdir={workdir}"]
        variables = os.environ | {"XDG_CACHE_HOME": cache}
        start, before = time.perf_counter(), count_cpu()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            if first_row is None and has_row(workdir):
                first_row = time.perf_counter() - start
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode or first_row is None:
            raise RuntimeError(f"{' '.join(command)}: code {process.returncode}")
        return Launch(first_row, seconds, count_cpu() - before)


def time_pair(flags: tuple[str, ...]) -> tuple[Launch, Launch]:
    """The same launch with empty caches and again, in another work folder."""
    with tempfile.TemporaryDirectory() as cache:
        return time_launch(flags, cache), time_launch(flags, cache)


def measure() -> list[tuple]:
    """A row of the table for each launch and state of the caches."""
    rows = []
    for name, flags in LAUNCHES.items():
        pairs = [time_pair(flags) for _ in range(REPETITIONS)]
        for caches, launches in zip(
            ("empty", "warm"), zip(*pairs, strict=True), strict=True
        ):
            columns = zip(*launches, strict=True)
            rows.append((name, caches, *(page.spread(list(c)) for c in columns)))
            print(page.table((), [rows[-1]]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    body = (
        f"{page.table(HEADER, measure())}\n\n"
        f"Median and range of {REPETITIONS}. A first row is the first round of a run "
        "alone; of the demo's first program every run has its first evaluation then, "
        "too. All includes the report."
    )
    page.write_section("first", "First rows", "python -m benchmarks.first_rows", body)


if __name__ == "__main__":
    main()
