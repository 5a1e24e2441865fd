"""The version of the package, which `pyproject.toml` alone has."""

import tomllib
from importlib import metadata
from pathlib import Path

NAME = "fedmoe_jax"
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def find_version(project: Path = PROJECT) -> str | None:
    """The version of the sources that run, installed or not; None where unknown.

    Args:
      project: of a checkout, whose word counts before that of an installed version.
    """
    return read_version(project) or find_installed(NAME)


def read_version(project: Path) -> str | None:
    """The version in a `pyproject.toml`; None where it is absent or of another."""
    try:
        fields = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return fields.get("version") if fields.get("name") == NAME else None


def find_installed(name: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
