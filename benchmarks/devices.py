"""One device against all, and what ragged clients waste.

    python -m benchmarks.devices

One device is timed twice: pinned to one core, and with all cores inside operators.
"""

import json
import os
import statistics
from pathlib import Path

import numpy as np

from benchmarks import page
from benchmarks.processes import run_python
from fedmoe_jax.data.partition import split
from fedmoe_jax.runtime.scheduling import chunk_size, wasted_share

RUNNER = Path(__file__).parent / "runners" / "fedmoe.py"
REPETITIONS, ROUNDS, WARM_UP = 3, 5, 2


def time_rounds(work: str, devices: int, cores: set[int]) -> list[float]:
    """Seconds of each timed round of a new process on so many devices."""
    flags = (f"--work={work}", f"--processes={devices}", f"--rounds={WARM_UP + ROUNDS}")
    output = run_python(str(RUNNER), *flags, cores=cores)
    events = [json.loads(line) for line in output.splitlines() if "{" in line]
    return [e["seconds"] for e in events if e["event"] == "round"][WARM_UP:]


def naive_waste(steps: np.ndarray, num_devices: int, chunk: int) -> float:
    """`wasted_share` if the cohort were cut into chunks and shares as it comes."""
    padded = np.pad(steps, (0, -len(steps) % (num_devices * chunk)))
    chunks = padded.reshape(num_devices, -1, chunk)
    busiest = chunks.max(-1).sum(-1).max()
    return 1 - steps.sum() / (busiest * num_devices * chunk)


def waste_table() -> str:
    """Wasted shares of cohorts of 100 under Dirichlet(0.1), mean over 20 cohorts."""
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    partition = split(
        "dirichlet",
        labels,
        num_clients=1000,
        num_strata=10,
        alpha=0.1,
        classes_per_client=2,
        min_size=1,
        seed=0,
    )
    steps = np.maximum(np.ceil(partition.size / 10), 1).astype(np.int32)
    rng = np.random.default_rng(1)
    cohorts = [rng.choice(steps, 100, replace=False) for _ in range(20)]
    rows = []
    for num_devices, chunk in ((2, 1), (8, 1), (1, 10), (8, 4)):
        chunk = chunk_size(100, num_devices, chunk)
        dealt = [float(wasted_share(c, num_devices, chunk)) for c in cohorts]
        naive = [naive_waste(c, num_devices, chunk) for c in cohorts]
        rows.append((num_devices, chunk, np.mean(dealt), np.mean(naive)))
    header = ("devices", "clients a chunk", "wasted, dealt", "wasted, as it comes")
    return page.table(header, [(d, c, f"{a:.1%}", f"{b:.1%}") for d, c, a, b in rows])


def main() -> None:
    cores = os.sched_getaffinity(0)
    ways = {  # devices and the cores that they may use
        "one, on one core": (1, {min(cores)}),
        "one, on all cores": (1, cores),
        f"{len(cores)}, on all cores": (len(cores), cores),
    }
    seconds = {(work, way): [] for work in "AB" for way in ways}
    for _ in range(REPETITIONS):
        for work, way in seconds:
            seconds[work, way] += time_rounds(work, *ways[way])
    rows = []
    for (work, way), values in seconds.items():
        slowest = statistics.median(seconds[work, next(iter(ways))])
        gain = slowest / statistics.median(values)
        rows.append((work, way, page.spread(values), gain))
    body = "\n\n".join(
        [
            "By default every core is a device. One device on all cores shares out each"
            " operator instead.",
            page.table(("work", "devices", "seconds a round", "faster than one"), rows),
            "Ragged clients: one local epoch, batch 10, 1000 clients of 50,000 "
            "examples under Dirichlet(0.1), cohorts of 100; share of the devices' "
            "local steps in which they wait or compute for nothing (`wasted_share` in "
            "the rows).",
            waste_table(),
        ]
    )
    print(body)
    page.write_section("devices", "Devices", "python -m benchmarks.devices", body)


if __name__ == "__main__":
    main()
