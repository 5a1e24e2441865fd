"""A second process that tells the end of the first where several hosts run together.

When one of them dies, JAX aborts the others from C++, with pages of its log and no
moment for Python. So a run over several processes is the child of a process that waits:
it passes signals on, keeps what C++ writes, and says in one line what has happened.
"""

import ctypes
import os
import re
import signal
import sys
import tempfile
from typing import BinaryIO

from fedmoe_jax.runtime.stop import listen_to_signals

PR_SET_PDEATHSIG = 1
TAIL = 20  # lines of C++ that are shown after another death
LOST = (
    "error: another process of this run, or the network between them, has ended; the "
    "same command on all hosts goes on after the newest checkpoint"
)


def runs_with_others(words: list[str]) -> bool:
    """Whether a command line makes its process one of several."""
    flag = re.compile(r"--?(coordinator_address|distributed)(=.*)?")
    return any(map(flag.fullmatch, words))


def guard() -> int:
    """Splits the process; returns in the child, and never in the parent.

    Returns:
      A file descriptor at which the child hears the signals that the parent gets. What
      C++ writes to the child's stderr is kept from the screen, what Python writes not.
    """
    heard, told = os.pipe()
    noise = open_noise()
    child = os.fork()
    if child:
        os.close(heard)
        listen_to_signals(told)
        _tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), noise)
    os.close(told)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    screen = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding)
    if noise:
        os.dup2(noise.fileno(), 2)
    sys.stderr = screen
    return heard


def open_noise() -> BinaryIO | None:
    """A file for what C++ writes; None where none can be made, then it is seen."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return None


def _tell(code: int, noise: BinaryIO | None) -> None:
    """Ends the parent as its child has ended, with a line where JAX aborted it."""
    if code >= 0 and code != 1:
        os._exit(code)
    lines = []
    if noise:
        noise.seek(0)
        lines = noise.read().decode(errors="replace").splitlines()
    if code == -signal.SIGABRT and any("coordination" in line for line in lines):
        print(LOST, file=sys.stderr, flush=True)
        os._exit(1)
    if lines:
        print(*lines[-TAIL:], sep="\n", file=sys.stderr, flush=True)
    if code == 1:
        os._exit(1)
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
