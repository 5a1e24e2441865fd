"""The process that tells the end of another."""

import signal
import subprocess
import sys

import pytest

from fedmoe_jax.runtime.guard import LOST, runs_with_others

# What the child does after it is split off.
START = """
import os, signal, sys, time
from fedmoe_jax.runtime.guard import guard
from fedmoe_jax.runtime.stop import Stop, listen
stop = Stop()
listen(stop, guard())
"""
NOISE = 'os.write(2, b"E1 coordination_service.cc:1] a task has crashed\\n")'


def run(child, **more):
    command, pipe = [sys.executable, "-c", START + child], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **more)


@pytest.mark.parametrize(
    ("child", "code", "told"),
    [
        ("sys.exit(3)", 3, ""),
        ("print('a mistake', file=sys.stderr); sys.exit(2)", 2, "a mistake\n"),
        (f"{NOISE}; sys.exit(0)", 0, ""),
        (f"{NOISE}; os.abort()", 1, f"{LOST}\n"),
        ("os.write(2, b'no memory\\n'); os.abort()", -signal.SIGABRT, "no memory\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.write(2, b'no chip\\n'); sys.exit(1)", 1, "no chip\n"),
    ],
)
def test_guard_ends_as_its_child_has_ended(child, code, told):
    with run(child) as process:
        assert process.communicate(timeout=60) == ("", told)
        assert process.returncode == code


def test_guard_passes_signals_on_and_its_child_hears_no_other():
    child = "os.kill(os.getpid(), signal.SIGTERM); print('on', flush=True)\n"
    child += "while not stop(): time.sleep(0.01)\nprint('stopped')"
    with run(child) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().endswith("stopped\n")
    assert process.returncode == 0


def test_guard_leaves_no_child_behind():
    with run("print('on', flush=True); time.sleep(99)") as process:
        assert process.stdout.readline() == "on\n"
        process.kill()
        assert process.stdout.read() == ""  # the child has closed it, too


def test_runs_with_others_by_the_flags():
    assert runs_with_others(["launch.py", "--distributed"])
    assert runs_with_others(["-coordinator_address=a:1"])
    assert runs_with_others(["--coordinator_address", "a:1"])
    assert not runs_with_others(["launch.py", "--config.seed=1", "--nodistributed"])
