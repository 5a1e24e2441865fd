"""Peak memory against the cohort, and compiling with a cold and a warm cache.

    python -m benchmarks.memory

Every figure comes from a process of its own.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from benchmarks import page
from benchmarks.processes import run_python
from benchmarks.start import keep_running, make_images, share_out, start
from configs import cifar10
from fedmoe_jax.runtime.xla import count_cores, keep_programs, set_cpu_devices

_COHORT = flags.DEFINE_integer("cohort", 0, "Only measure this cohort's peak memory.")
_COMPILE = flags.DEFINE_bool("compile", False, "Only compile the CIFAR-10 round.")

COHORTS = (20, 100, 500)
REPETITIONS = 3


def peak_memory(cohort: int) -> dict[str, float]:
    """Peak resident MB of this process after three rounds of Work B's network."""
    sys.path.insert(0, str(Path(__file__).parent / "runners"))
    import fedmoe
    import meter

    work = meter.works.WORKS["C"]._replace(clients=500, cohort=cohort)
    advance = keep_running(
        start(fedmoe.describe(work), *fedmoe.load(work), count_cores())
    )
    for _ in range(3):
        advance()
    return {"peak_mb": meter.peak_mb()}


def compile_round() -> dict[str, float]:
    """Seconds that compiling the round of the CIFAR-10 study takes."""
    keep_programs()
    data = make_images(50_000, (32, 32, 3), 10)
    partition = share_out(20, 2500, 50_000, 10)
    started = start(cifar10.get_config(), data, partition, count_cores())
    return {"compile_seconds": started.compile_seconds}


def ask(flag: str, cache: str) -> float:
    """The figure that a process of its own measures."""
    output = run_python("-m", "benchmarks.memory", flag, cache=cache)
    (value,) = json.loads(output.splitlines()[-1]).values()
    return value


def main(_) -> None:
    set_cpu_devices(0)
    if _COHORT.value or _COMPILE.value:
        found = compile_round() if _COMPILE.value else peak_memory(_COHORT.value)
        print(json.dumps(found))
        return
    peaks, cold, warm = {cohort: [] for cohort in COHORTS}, [], []
    for _ in range(REPETITIONS):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(ask("--compile", cache))
            warm.append(ask("--compile", cache))
            for cohort in COHORTS:
                peaks[cohort].append(ask(f"--cohort={cohort}", cache))
    peak = {cohort: statistics.median(values) for cohort, values in peaks.items()}
    growth = peak[COHORTS[-1]] / peak[COHORTS[0]]
    body = "\n\n".join(
        [
            "A cohort of "
            f"{COHORTS[-1]} needs **{growth:.3f}** times the peak memory of one of "
            f"{COHORTS[0]} (MLP 3072-64-10, 500 clients, 50,000 images): sums are "
            "streamed.",
            page.table(
                ("cohort", "peak resident MB"),
                [(cohort, page.spread(peaks[cohort])) for cohort in COHORTS],
            ),
            "Compiling the round of `configs/cifar10.py` takes "
            f"**{page.spread(cold)}** s, and **{page.spread(warm)}** s from the "
            "program cache (median and range, a new process each).",
        ]
    )
    print(body)
    page.write_section(
        "memory", "Memory and start-up", "python -m benchmarks.memory", body
    )


if __name__ == "__main__":
    app.run(main)
