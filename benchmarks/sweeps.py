"""A sweep as one program against launches and against runs in one process.

    python -m benchmarks.sweeps

Three strategies x five seeds on the embedded digits, reports included in every way of
running them: `compare` as one program, fifteen calls of `launch.py`, and fifteen calls
of `train` in one process. Caches of compiled programs are empty at the start of each.
"""

import statistics
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks import page
from benchmarks.processes import run_python

_LOOP = flags.DEFINE_string("loop", None, "Only run all members in turn, into here.")

STRATEGIES = ("random", "greedy", "load_balanced")
SEEDS = (0, 1, 2, 3, 4)
ROUNDS = 40
REPETITIONS = 2


def study():
    """The sweep as a config."""
    from configs import compare

    config = compare.get_config("digits")
    config.compare.strategies, config.compare.seeds = STRATEGIES, SEEDS
    config.num_rounds = ROUNDS
    return config


def loop(folder: Path) -> None:
    """Every member in turn in this process, with one report over all."""
    from fedmoe_jax.report.page import write_report
    from fedmoe_jax.report.runs import load_run
    from fedmoe_jax.runtime.xla import set_cpu_devices
    from fedmoe_jax.train.compare import list_members
    from fedmoe_jax.train.run import train

    set_cpu_devices(0)
    folders = []
    for name, config in list_members(study()):
        folders.append(folder / "runs" / name)
        train(config, folders[-1], stop=lambda: False, label=name, profile=False)
    write_report(folder, [load_run(each) for each in folders], "loop")


def run_sweep(folder: str, cache: str) -> None:
    run_python(
        *("launch.py", "--config=configs/compare.py:digits", f"--workdir={folder}"),
        f"--config.compare.strategies={STRATEGIES}",
        f"--config.compare.seeds={SEEDS}",
        f"--config.num_rounds={ROUNDS}",
        cache=cache,
    )


def run_launches(folder: str, cache: str) -> None:
    for strategy in STRATEGIES:
        for seed in SEEDS:
            run_python(
                *("launch.py", f"--workdir={folder}/{strategy}-{seed}"),
                f"--config.num_rounds={ROUNDS}",
                *(f"--config.strategy={strategy}", f"--config.seed={seed}"),
                cache=cache,
            )


def run_loop(folder: str, cache: str) -> None:
    run_python("-m", "benchmarks.sweeps", f"--loop={folder}", cache=cache)


WAYS = {
    "one program (`configs/compare.py`)": run_sweep,
    "15 runs in one process": run_loop,
    "15 launches": run_launches,
}


def main(_) -> None:
    if _LOOP.value:
        return loop(Path(_LOOP.value))
    seconds = {name: [] for name in WAYS}
    for _ in range(REPETITIONS):
        for name, way in WAYS.items():
            with (
                tempfile.TemporaryDirectory() as folder,
                tempfile.TemporaryDirectory() as cache,
            ):
                start = time.monotonic()
                way(f"{folder}/run", cache)
                seconds[name].append(time.monotonic() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    sweep, together, launches = median.values()
    body = "\n\n".join(
        [
            f"A sweep of 3 strategies x 5 seeds, {ROUNDS} rounds each, takes "
            f"**1/{launches / sweep:.1f}** of the time of fifteen launches and "
            f"**1/{together / sweep:.1f}** of fifteen runs one after the other in one "
            "process. All include start-up, compiling without a cache, evaluation, "
            "checkpoints and reports; launches after the first find its programs in "
            "the program cache, as they do by default.",
            page.table(
                ("way", "seconds"),
                [(name, page.spread(values)) for name, values in seconds.items()],
            ),
        ]
    )
    print(body)
    page.write_section("sweeps", "Sweeps", "python -m benchmarks.sweeps", body)


if __name__ == "__main__":
    app.run(main)
