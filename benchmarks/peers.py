"""Times federated-learning simulators side by side: `python -m benchmarks.peers`.

CPU only. Every peer runs in its own environment, made on first use outside the
repository. Launches are interleaved (every peer once, then again), so that a slow spell
of the machine hits all alike, and each is compared with ours of the same turn: a pair.
JAX peers get the XLA flags that fedmoe_jax sets for itself. A peer that does not
install or run becomes a row that says why.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import launches, peers_page, works
from benchmarks.launches import Launch, PeerError
from fedmoe_jax.runtime.xla import CPU_FLAGS, ONE_THREAD, count_cores

HERE = Path(__file__).parent
QUICK_ROUNDS = 2
LEAST_PAIRS = 5  # of a range on the page
ENVIRONMENTS = Path.home() / ".cache/fedmoe_jax/peers"


class Peer(NamedTuple):
    """One row of the comparison."""

    label: str  # {p} stands for --processes
    kind: str  # "ours", "pytorch" or "jax"
    runner: str
    environment: str | None  # None: this interpreter
    parallel: bool  # told to use --processes workers, threads or devices; else 1
    devices: bool = False  # these are devices of XLA
    models: tuple[str, ...] = ("cnn", "mlp")  # of the works that it can do
    note: str = ""
    cnn_note: str = ""


PFL_NOTE = "draws its cohort with replacement"
FLOWER_NOTE = "weights are serialised; its poll interval cut from 0.1 s to 0.01 s"
FEDJAX_NOTE = "one dispatch a step; its pmap backend does not run on current JAX"
DRJAX_NOTE = "convolution as im2col: XLA's own is 11 times slower in a loop on CPU"
PEERS = {
    "fedmoe": Peer(
        *("fedmoe_jax", "ours", "fedmoe.py", None, True, True),
        models=("cnn", "mlp", "mixture", "language"),
    ),
    "pfl-single": Peer(
        "pfl-research, 1 process",
        "pytorch",
        "pfl_fedavg.py",
        "pfl",
        False,
        note=PFL_NOTE,
    ),
    "pfl": Peer(
        "pfl-research, {p} processes",
        "pytorch",
        "pfl_fedavg.py",
        "pfl",
        True,
        note=PFL_NOTE,
    ),
    "flower": Peer(
        "Flower, {p} actors",
        "pytorch",
        "flower_fedavg.py",
        "flower",
        True,
        note=FLOWER_NOTE,
    ),
    "torch-single": Peer(
        "PyTorch loop, 1 thread", "pytorch", "torch_loop.py", "torch", False
    ),
    "torch": Peer(
        "PyTorch loop, {p} threads", "pytorch", "torch_loop.py", "torch", True
    ),
    "torch-mixture": Peer(
        "PyTorch mixture, {p} processes",
        *("pytorch", "torch_mixture.py", "torch", True),
        models=("mixture",),
    ),
    "torch-language": Peer(
        "PyTorch language, {p} processes",
        *("pytorch", "torch_language.py", "torch", True),
        models=("language",),
    ),
    "fedjax": Peer(
        "FedJAX, jit backend",
        "jax",
        "fedjax_fedavg.py",
        "fedjax",
        True,
        note=FEDJAX_NOTE,
    ),
    "drjax": Peer(
        "DrJAX, {p} devices",
        "jax",
        "drjax_fedavg.py",
        "drjax",
        True,
        True,
        cnn_note=DRJAX_NOTE,
    ),
}


def parse_flags() -> argparse.Namespace:
    """The command line."""
    split = lambda text: text.split(",")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--works", type=split, default=list(works.WORKS), help="of benchmarks/works.py")
    add("--peers", type=split, default=list(PEERS), help="which peers")
    add("--repetitions", type=int, default=5, help="launches of every peer and work")
    add("--rounds", type=int, help="timed rounds a launch, instead of the work's own")
    add("--processes", type=int, default=os.cpu_count(), help="workers of a peer")
    add("--envs", type=Path, default=ENVIRONMENTS, help="where environments lie")
    add("--timeout", type=float, default=1800, help="seconds until a launch has failed")
    add("--quick", action="store_true", help="one launch, two rounds, writes nothing")
    flags = parser.parse_args()
    for field, known in (("works", works.WORKS), ("peers", PEERS)):
        unknown = set(getattr(flags, field)) - set(known)
        if unknown:
            parser.error(f"--{field}: {sorted(unknown)[0]!r} is none of {list(known)}")
    if flags.repetitions < LEAST_PAIRS and not flags.quick:
        parser.error(f"--repetitions={flags.repetitions}; allowed: >= {LEAST_PAIRS}")
    return flags


def install_all(names: list[str], folder: Path) -> dict[str, Path | PeerError]:
    """The interpreter of each environment that peers need, or why there is none."""
    pythons = {}
    for environment in {e for name in names if (e := PEERS[name].environment)}:
        try:
            pythons[environment] = launches.install(environment, folder)
        except PeerError as error:
            print(f"{environment} {error}", flush=True)
            pythons[environment] = error
    return pythons


def choose_flags(peer: Peer, cohort: int, processes: int) -> dict[str, str]:
    """`XLA_FLAGS` of a JAX peer: those of `set_cpu_devices` for as many devices.

    Ours sets its own.
    """
    if peer.kind != "jax":
        return {}
    devices = math.gcd(cohort, processes) if peer.devices else 1
    every_core = devices == count_cores() > 1
    return {"XLA_FLAGS": " ".join((*CPU_FLAGS, *[ONE_THREAD] * every_core))}


def run_peer(
    name: str,
    work: str,
    rounds: int,
    pythons: dict[str, Path | PeerError],
    flags: argparse.Namespace,
) -> Launch:
    """Launches a peer's runner once."""
    peer = PEERS[name]
    runner = HERE / "runners" / peer.runner
    if not runner.exists():
        raise PeerError(f"benchmarks/runners/{peer.runner} is missing")
    python, path = sys.executable, str(HERE.parent)
    if peer.environment:
        python, path = pythons[peer.environment], ""
    if isinstance(python, PeerError):
        raise python
    processes = flags.processes if peer.parallel else 1
    command = [str(python), str(runner), f"--work={work}"]
    command += [f"--rounds={launches.WARM_UP + rounds}", f"--processes={processes}"]
    variables = launches.child_variables(path)
    variables |= choose_flags(peer, works.WORKS[work].cohort, flags.processes)
    return launches.launch(command, variables, flags.timeout)


def repeat(
    names: list[str], repetitions: int, run: Callable[[str], Launch]
) -> tuple[dict[str, list[Launch]], dict[str, str]]:
    """Launches every peer `repetitions` times in turn; one that fails is not run again.

    Returns:
      Launches and reasons of failure, each by name.
    """
    found, failures = {name: [] for name in names}, {}
    for repetition in range(repetitions):
        for name in (name for name in names if name not in failures):
            load = os.getloadavg()[0]
            print(f"  {repetition + 1} {name:13} load {load:.1f}", end=" ", flush=True)
            try:
                found[name].append(run(name))
                print(f"{median(found[name][-1].seconds):.3f} s/round", flush=True)
            except PeerError as error:
                failures[name] = str(error)
                print(error, flush=True)
    return found, failures


def summarise(work: works.Work, found: list[Launch]) -> dict[str, float]:
    """Medians over all timed rounds, and the range of the launches' own medians."""
    seconds = median(s for one in found for s in one.seconds)
    medians = [median(one.seconds) for one in found]
    tokens = works.tokens_per_round(work)
    return {
        "seconds": seconds,
        "seconds_min": min(medians),
        "seconds_max": max(medians),
        "updates_per_s": work.cohort / seconds,
        "examples_per_s": works.examples_per_round(work) / seconds,
        **({"tokens_per_s": tokens / seconds} if tokens else {}),
        "cpu_seconds": median(s for one in found for s in one.cpu_seconds),
        "peak_mb": max(one.peak_mb for one in found),
        "startup_s": median(one.startup for one in found),
        "loss": median(one.loss for one in found),
        "rounds": sum(len(one.seconds) for one in found),
    }


def build_rows(
    name: str, found: dict, failures: dict, dense: float, processes: int
) -> list[dict]:
    """Rows of one work, one for each peer; `dense` is in GFLOP/s."""
    work, rows = works.WORKS[name], []
    ours = [one for key in found if PEERS[key].kind == "ours" for one in found[key]]
    for key, launched in found.items():
        peer = PEERS[key]
        label = peer.label.format(p=processes)
        notes = [peer.note, peer.cnn_note if work.model == "cnn" else ""]
        row: dict[str, Any] = {"work": name, "peer": label, "kind": peer.kind}
        if launched:
            row |= summarise(work, launched) | compare(launched, ours)
            rate = row["examples_per_s"] * works.flops_per_example(work.model) / 1e9
            row["dense_share"] = rate / dense
        row["note"] = "; ".join(filter(None, [*notes, failures.get(key, "")]))
        rows.append(row)
    return rows


def compare(found: list[Launch], ours: list[Launch]) -> dict[str, float]:
    """A peer's seconds, wall and CPU, divided by ours: medians and ranges of the pairs.

    Where ours or the peer failed there is no pair, and nothing is compared.
    """
    row, pairs = {}, list(zip(found, ours, strict=False))
    for name, field in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        middle = lambda one, field=field: median(getattr(one, field))
        ratios = [middle(peer) / middle(mine) for peer, mine in pairs]
        if ratios:
            row |= {name: median(ratios), "pairs": len(ratios)}
            row |= {f"{name}_min": min(ratios), f"{name}_max": max(ratios)}
    return row


def run_work(name: str, pythons: dict, flags: argparse.Namespace) -> list[dict]:
    """Measures one work: its peers, between two measurements of the dense limit."""
    work = works.WORKS[name]
    repetitions = 1 if flags.quick else flags.repetitions
    rounds = flags.rounds or (QUICK_ROUNDS if flags.quick else work.timed_rounds)
    print(f"{name}: {work.title}, {repetitions} x {rounds} rounds", flush=True)
    limits = [launches.measure_dense()]
    run = lambda peer: run_peer(peer, name, rounds, pythons, flags)
    able = [peer for peer in flags.peers if work.model in PEERS[peer].models]
    found, failures = repeat(able, repetitions, run)
    limits.append(launches.measure_dense())
    print("  dense limit " + ", ".join(f"{x:.0f}" for x in limits) + " GFLOP/s")
    rows = build_rows(name, found, failures, median(limits), flags.processes)
    for row in rows:
        print(f"  {row['peer']:30} {peers_page.say_rates(row)}", flush=True)
    return rows


def main() -> None:
    flags, rows = parse_flags(), []
    pythons = install_all(flags.peers, flags.envs.expanduser())
    for name in flags.works:
        rows += run_work(name, pythons, flags)
        if not flags.quick:
            peers_page.write(rows, shlex.join(sys.argv[1:]))
    if flags.quick:
        print(peers_page.render([row | {"measured": "quick"} for row in rows]))


if __name__ == "__main__":
    main()
