"""Memory maps of a process that compares many runs, no two of one shape.

    python -m benchmarks.maps

Linux allows a process 65,530 of them, and compiled programs have thousands.
"""

import tempfile
from pathlib import Path

from absl import app
from ml_collections import ConfigDict

from benchmarks import page
from configs import compare as study
from fedmoe_jax.runtime.xla import keep_programs, set_cpu_devices
from fedmoe_jax.train.compare import compare

RUNS = 80
EVERY = 10
LIMIT = 20_000  # maps below which such a comparison is meant to stay
HEADER = ("runs", "maps after the last", "most so far")

Seen = list[tuple[int, int]]  # (runs finished, maps), in the order of time


def list_shapes(count: int) -> ConfigDict:
    """The config of a comparison of tiny runs, each with experts of another width."""
    config = study.get_config("digits,smoke")
    changes = tuple(f"model.expert_width={8 + number}" for number in range(count))
    config.compare.update(strategies=("load_balanced",), changes=changes)
    return config


def count_maps() -> int:
    """Memory maps of this process."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def watch(config: ConfigDict) -> Seen:
    """Maps before every run's rounds, after each chunk of them and after every run."""
    seen: Seen = []
    with tempfile.TemporaryDirectory() as folder:

        def look() -> bool:
            finished = len(list(Path(folder).glob("runs/*/summary.json")))
            seen.append((finished, count_maps()))
            print(f"maps {seen[-1][1]} after {finished} runs", flush=True)
            return False

        compare(config, Path(folder), stop=look, profile=False)
    return seen


def make_rows(seen: Seen, every: int) -> list[tuple[str, int, int]]:
    """A row of the table for every so many runs."""
    rows = []
    for runs in range(every, seen[-1][0] + 1, every):
        end = [finished for finished, _ in seen].index(runs) + 1
        so_far = [maps for _, maps in seen[:end]]
        rows.append((f"{runs}", so_far[-1], max(so_far)))
    return rows


def main(_) -> None:
    set_cpu_devices(0)
    keep_programs()
    rows = make_rows(watch(list_shapes(RUNS)), EVERY)
    most = rows[-1][-1]
    body = (
        f"A comparison of {RUNS} runs of different shapes in one process has at most "
        f"**{most:,}** memory maps, {'below' if most < LIMIT else 'not below'} "
        f"{LIMIT:,}: programs of earlier shapes are let go.\n\n"
        f"{page.table(HEADER, rows)}"
    )
    print(body)
    page.write_section("maps", "Memory maps", "python -m benchmarks.maps", body)


if __name__ == "__main__":
    app.run(main)
