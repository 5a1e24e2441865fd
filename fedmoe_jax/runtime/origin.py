"""The origin of a number: the code, the versions and the device that made it."""

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from fedmoe_jax.runtime.settings import describe_settings
from fedmoe_jax.version import find_installed, find_version

PACKAGE = Path(__file__).parents[1]
# Beside XLA_FLAGS, variables of accelerators that change arithmetic.
VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


def describe_variables() -> str:
    """Those of `VARIABLES` that are set, on one line."""
    found = ((name, os.environ.get(name)) for name in VARIABLES)
    return " ".join(f"{name}={value}" for name, value in found if value)


def ask_git(folder: Path, *words: str) -> str | None:
    """The answer of a `git` command about a folder; None where it has none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=9,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_commit(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of a folder of sources, and whether they differ from it.

    Both are None without a checkout. A package that is installed inside the checkout of
    something else is no part of that, so it has no commit either.
    """
    if not ask_git(folder, "ls-files", "--", "__init__.py"):
        return None, None
    changes = ask_git(folder, "status", "--porcelain", "--", ".")
    return ask_git(folder, "rev-parse", "HEAD"), bool(changes)


@functools.cache
def find_origin() -> dict[str, Any]:
    """The code, versions and device of this process, for `summary.json`.

    The sources are looked at once, as early as they are asked for: a long run may see
    another commit before it ends.

    Returns:
      `commit` and `dirty` of the package's sources, versions of `fedmoe_jax`, `python`,
      `jax` and `jaxlib`, `device` (its kind), `xla_flags`, `variables` and `settings`
      (of JAX, as `describe_settings` has them); None where unknown.
    """
    commit, dirty = find_commit(PACKAGE)
    return {
        "commit": commit,
        "dirty": dirty,
        "fedmoe_jax": find_version(),
        "python": platform.python_version(),
        "jax": find_installed("jax"),
        "jaxlib": find_installed("jaxlib"),
        "device": jax.local_devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "variables": describe_variables(),
        "settings": describe_settings(),
    }
