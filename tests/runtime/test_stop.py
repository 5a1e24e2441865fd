"""Signals that end a process are a wish to stop, heard at any moment."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fedmoe_jax.runtime.stop import ECHO_SECONDS, ENDINGS

# Computes in C, as XLA does while it compiles: Python runs no handler meanwhile.
BUSY = """
import hashlib, signal, sys
from fedmoe_jax.runtime.stop import Stop, listen
for name in sys.argv[2:]:  # whatever the suite was started to ignore
    signal.signal(getattr(signal, name), signal.SIG_DFL)
stop = Stop()
listen(stop)
print("busy", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
print("wished", stop(), flush=True)
"""


@contextlib.contextmanager
def begin(work, *before, heard=ENDINGS):
    command = [*before, sys.executable, "-c", BUSY, work, *heard]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as busy:
        assert busy.stdout.readline() == "busy\n"
        yield busy


@pytest.mark.parametrize("name", ENDINGS)
def test_a_signal_is_told_at_once(name):
    with begin("1000000000") as busy:
        busy.send_signal(getattr(signal, name))
        told = busy.stdout.readline()
        assert told.startswith("stopping once the current rounds, or what compiles")
        busy.kill()


def test_a_second_signal_ends_the_process():
    with begin("1000000000") as busy:
        busy.send_signal(signal.SIGTERM)
        assert busy.stdout.readline().startswith("stopping")
        time.sleep(1.1 * ECHO_SECONDS)
        busy.send_signal(signal.SIGINT)
        assert busy.wait(60) == 128 + signal.SIGINT


@pytest.mark.slow
def test_a_signal_that_comes_twice_is_one():
    with begin("3000000") as busy:
        for name in ("SIGHUP", "SIGHUP", "SIGTERM"):
            busy.send_signal(getattr(signal, name))
        assert busy.stdout.readline().startswith("stopping")
        assert busy.stdout.read() == "wished True\n"


def test_an_ignored_signal_stays_ignored():
    with begin("300000", "nohup", heard=()) as busy:
        os.kill(busy.pid, signal.SIGHUP)
        assert busy.stdout.read() == "wished False\n"
