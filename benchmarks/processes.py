"""Figures that need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(
    *arguments: str, cache: str | None = None, cores: set[int] | None = None
) -> str:
    """Standard output of one Python process in the repository's root.

    Args:
      arguments: of the interpreter.
      cache: folder of JAX's compiled programs; None leaves what the variables say.
      cores: the only ones that it may use; None for all.

    Raises:
      RuntimeError: it fails; with the end of what it wrote to standard error.
    """
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    variables.pop("XLA_FLAGS", None)
    if cache is not None:
        variables["JAX_COMPILATION_CACHE_DIR"] = cache
    pinned = None if cores is None else lambda: os.sched_setaffinity(0, cores)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        preexec_fn=pinned,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
