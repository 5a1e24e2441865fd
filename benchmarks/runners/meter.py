"""The report of every runner, as JSON lines on standard output.

    {"event": "round", "seconds": s, "cpu_seconds": c}    after every round
    {"event": "check", "before": b, "value": v}           loss before and after training
    {"event": "done", "peak_mb": m}                       last

`cpu_seconds` and `peak_mb` are sums over this process and all its descendants; the peak
is the sum of each process's own peak resident size.
Runners that need a module beside them import this one first, for it sets the path.
Linux only; standard library only.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import works  # noqa: E402


def parse_flags() -> tuple[works.Work, int, int]:
    """The work, the rounds and the processes that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=sorted(works.WORKS), required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    flags = parser.parse_args()
    return works.WORKS[flags.work], flags.rounds, flags.processes


def _stat(process: int) -> tuple[int, int]:
    """A process's parent, and its clock ticks with those of children it waited for."""
    text = Path(f"/proc/{process}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15]))


def process_tree() -> dict[int, int]:
    """Clock ticks of this process and of each living descendant, by process id."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = _stat(int(entry.name))
            except OSError:  # it has ended
                continue
    tree, found = {}, [os.getpid()]
    while found:
        process = found.pop()
        tree[process] = stats[process][1]
        found += [child for child, (parent, _) in stats.items() if parent == process]
    return tree


def cpu_seconds() -> float:
    """CPU time spent so far, user and system."""
    return sum(process_tree().values()) / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    """Sum of the processes' peak resident sizes, in MB (10^6 bytes)."""
    total = 0
    for process in process_tree():
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        total += sum(map(int, re.findall(r"VmHWM:\s*(\d+)", status)))
    return total * 1024 / 1e6


def emit(event: str, **fields) -> None:
    """Prints one event."""
    print(json.dumps({"event": event, **fields}), flush=True)


class Meter:
    """Times rounds: from its making, or the last `end_round`, to `end_round`."""

    def __init__(self):
        self._cpu = cpu_seconds()
        self._start = time.perf_counter()

    def end_round(self) -> None:
        """Reports the round that ends here and starts the next one."""
        end, cpu = time.perf_counter(), cpu_seconds()
        emit("round", seconds=end - self._start, cpu_seconds=cpu - self._cpu)
        self._cpu, self._start = cpu, time.perf_counter()


def finish(before: float, after: float) -> None:
    """Reports the loss on the checked images and the peak memory."""
    emit("check", before=float(before), value=float(after))
    emit("done", peak_mb=peak_mb())
