"""One device against all, and what ragged clients waste.

python -m benchmarks.devices
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import page
from fedmoe_jax.dealing import chunk_size, wasted_share
from fedmoe_jax.machine import count_cores
from fedmoe_jax.partition import split

RUNNER = Path(__file__).parent / "runners" / "fedmoe.py"
REPETITIONS, ROUNDS, WARM_UP = 3, 5, 2


def time_rounds(work: str, devices: int) -> list[float]:
    """Seconds of each timed round of a new process on so many devices."""
    command = [sys.executable, RUNNER, f"--work={work}", f"--processes={devices}"]
    rounds = f"--rounds={WARM_UP + ROUNDS}"
    environment = os.environ | {"PYTHONPATH": str(RUNNER.parent.parent.parent)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [*command, rounds], env=environment, check=True, capture_output=True, text=True
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if "{" in line]
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
        num_classes=10,
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
    cores = count_cores()
    seconds = {(w, d): [] for w in "AB" for d in (1, cores)}
    for _ in range(REPETITIONS):
        for work, devices in seconds:
            seconds[work, devices] += time_rounds(work, devices)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    gain = {work: median[work, 1] / median[work, cores] for work in "AB"}
    body = "\n\n".join(
        [
            f"{cores} devices are **{gain['A']:.2f}** times as fast as one on Work A "
            f"(the CNN) and {gain['B']:.2f} times on Work B (the MLP). One device may "
            "use all cores inside each operator.",
            page.table(
                ("work", "devices", "seconds a round"),
                [(*key, page.spread(values)) for key, values in seconds.items()],
            ),
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
