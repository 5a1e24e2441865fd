"""Environments and launches of the peers' runners; the runners print JSON lines."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

WARM_UP = 2  # rounds of a launch that are not timed
TORCH = "torch==2.13.0"
# PyTorch's own index has builds without CUDA, which the default one lacks on Linux.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIREMENTS = {
    "pfl": (TORCH, "pfl[pytorch]==0.6.0", "numpy==2.4.6"),
    "flower": (TORCH, "flwr[simulation]==1.41.0", "ray==2.55.1"),
    "torch": (TORCH, "numpy==2.4.6"),
    "fedjax": (
        "fedjax==0.0.17",
        "jax==0.10.2",
        "dm-haiku==0.0.17",
        "optax==0.2.8",
    ),
    "drjax": ("drjax==0.2.1", "jax==0.10.2", "flax==0.12.8", "optax==0.2.8"),
}


class PeerError(Exception):
    """Why a peer has no numbers, on one line."""


class Launch(NamedTuple):
    """One launch: its timed rounds, peak memory and time to the first round's end.

    `loss` is that on the checked images after the last round.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    peak_mb: float
    startup: float
    loss: float


def last_line(text: str) -> str:
    """The last line that names an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:200].replace("|", "/")


def _pip(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"does not install: {last_line(done.stderr)}")


def install(name: str, folder: Path) -> Path:
    """The interpreter of an environment, made unless it holds the requirements.

    Raises:
      PeerError: pip or venv fails.
    """
    python, stamp = folder / name / "bin/python", folder / name / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {name} into {folder / name} ...", flush=True)
    command = [sys.executable, "-m", "venv", "--clear", "--without-pip", folder / name]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise PeerError(f"no environment: {last_line(made.stderr)}")
    if TORCH in REQUIREMENTS[name]:  # alone, so that only it is asked of that index
        _pip(python, "--no-deps", "--extra-index-url", TORCH_INDEX, TORCH)
    _pip(python, *REQUIREMENTS[name])
    stamp.write_text(wanted)
    return python


def parse_event(line: str) -> dict | None:
    """A runner's event, or None for any other line."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def read_events(events: list[dict], startup: float) -> Launch:
    """Drops the warm-up rounds and checks that the peer trained.

    Raises:
      PeerError: rounds are missing, or the loss is not finite or did not move.
    """
    rounds = [event for event in events if event["event"] == "round"][WARM_UP:]
    check = [event for event in events if event["event"] == "check"]
    done = [event for event in events if event["event"] == "done"]
    if not (rounds and check and done):
        raise PeerError("ended before its last round")
    value = check[-1]["value"]
    if value is None or not math.isfinite(value) or value == check[-1].get("before"):
        raise PeerError(f"did not train: its loss is {value}")
    seconds = [event["seconds"] for event in rounds]
    cpu_seconds = [event["cpu_seconds"] for event in rounds]
    return Launch(seconds, cpu_seconds, done[-1]["peak_mb"], startup, value)


def child_variables(path: str) -> dict[str, str]:
    """This process's variables with `PYTHONPATH` = `path`, on CPU, no thread limits."""
    dropped = ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
    variables = {k: v for k, v in os.environ.items() if k not in dropped}
    return variables | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def kill_group(process: subprocess.Popen) -> None:
    """Ends a process that leads a group, and the group; it may have ended already."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def launch(command: list[str], variables: dict[str, str], timeout: float) -> Launch:
    """Runs a runner to its end.

    Raises:
      PeerError: it fails, takes longer than `timeout` seconds, or did not train.
    """
    events, startup, start = [], math.nan, time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(
            command, env=variables, start_new_session=True, **pipes
        )
        timer = threading.Timer(timeout, kill_group, (process,))
        timer.start()
        with process:
            try:
                assert process.stdout is not None  # a pipe
                for event in filter(None, map(parse_event, process.stdout)):
                    if event["event"] == "round" and not events:
                        startup = time.perf_counter() - start
                    events.append(event)
                status = process.wait()
            finally:
                timer.cancel()
                kill_group(process)  # what it started may outlive it
        if time.perf_counter() - start > timeout:
            raise PeerError(f"took longer than {timeout:.0f} s")
        if status:
            errors.seek(0)
            raise PeerError(f"exit status {status}: {last_line(errors.read())}")
    return read_events(events, startup)


def measure_dense() -> float:
    """GFLOP/s of a 4096 x 4096 float32 matrix product on all cores, best of 5."""
    code = (
        "import jax, time\n"
        "x = jax.random.normal(jax.random.key(0), (4096, 4096))\n"
        "f = jax.jit(lambda x: x @ x)\n"
        "f(x).block_until_ready()\n"
        "def once():\n"
        "  start = time.perf_counter()\n"
        "  f(x).block_until_ready()\n"
        "  return time.perf_counter() - start\n"
        "print(2 * 4096**3 / min(once() for _ in range(5)) / 1e9)\n"
    )
    command = [sys.executable, "-c", code]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return float(subprocess.check_output(command, env=variables, text=True))
