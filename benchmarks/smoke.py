"""The short form of every study, from a cold compilation cache to its report.

    python -m benchmarks.smoke
    python -m benchmarks.smoke systems stress

The second form prints the rows of these files and writes no page. CIFAR-10 is decoded
beforehand; its records are in TFDS_DATA_DIR.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import page
from fedmoe_jax.report.rows import read_metrics

ROOT = Path(__file__).parent.parent
HEADER = ("config", "runs", "programs", "seconds", "CPU seconds", "compiling, s")


class Short(NamedTuple):
    """One short study, as a user sees it.

    Attributes:
      runs: runs of the study.
      programs: compiled programs of a chunk of rounds.
      seconds: wall, from the call to the prompt.
      cpu_seconds: of all its threads.
      compiling: wall seconds in which rounds and evaluations were compiled.
    """

    runs: int
    programs: int
    seconds: float
    cpu_seconds: float
    compiling: float


def list_studies() -> list[str]:
    """The names of all config files."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def count_cpu() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_study(workdir: Path) -> tuple[int, int, float]:
    """Runs, programs and seconds of compiling of a finished study."""
    runs = [path.parent for path in workdir.glob("**/summary.json")]
    waves = (workdir / "checkpoints").iterdir() if runs != [workdir] else [workdir]
    rows = [row for folder in runs for row in read_metrics(folder / "metrics.jsonl")]
    compiling = sum(row.get("compile_seconds", 0.0) for row in rows)
    return len(runs), len(list(waves)), compiling


def run_study(name: str) -> Short:
    """Runs `configs/NAME.py:smoke` in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, cache = Path(folder, "run"), Path(folder, "programs")
        variables = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",  # as in launch.py
        }
        config = f"--config=configs/{name}.py:smoke"
        command = [sys.executable, "launch.py", config, f"--workdir={workdir}"]
        start, before = time.perf_counter(), count_cpu()
        subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seconds = time.perf_counter() - start
        runs, programs, compiling = read_study(workdir)
        return Short(runs, programs, seconds, count_cpu() - before, compiling)


def measure(names: list[str]) -> list[tuple]:
    """A row of the table for each study, printed when it is there."""
    rows = []
    for name in names:
        rows.append((f"`{name}.py:smoke`", *run_study(name)))
        print(page.table((), [rows[-1]]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    names = sys.argv[1:]
    if names:
        measure(names)
        return
    body = (
        f"{page.table(HEADER, measure(list_studies()))}\n\n"
        "From the call to the prompt, report and table included, with an empty "
        "compilation cache and decoded images."
    )
    page.write_section("smoke", "Short studies", "python -m benchmarks.smoke", body)


if __name__ == "__main__":
    main()
