"""Seals: digests of the files of a finished run, which do not change any more."""

from pathlib import Path

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import digest, read_json, write_json

SEALS = "sha256.json"
CONFIG, METRICS = "config.json", "metrics.jsonl"
ORIGINS = "origins.json"  # of a run in progress, too, with a digest of its own
RESULTS = (METRICS, "final.npz", "summary.json")
SEALED = (CONFIG, *RESULTS)


def seal(folder: Path) -> None:
    """Records the sha256 of a finished run's files in its `sha256.json`."""
    write_json(folder / SEALS, {name: digest(folder / name) for name in SEALED})


def is_sealed(folder: Path) -> bool:
    """Whether a run has seals; those of older versions have none."""
    return (folder / SEALS).is_file()


def find_broken(folder: Path) -> list[str]:
    """Names of sealed files that are missing or not as they were sealed.

    Older seals do not have the config.

    Raises:
      UserError: the seals themselves are damaged, or lack one of `RESULTS`.
    """
    if not is_sealed(folder):
        return []
    seals = read_json(folder / SEALS)
    for name in RESULTS:
        if name not in seals:
            raise UserError(
                f"{folder / SEALS} is damaged: it has no {name}; restore it, or give "
                "the run's command again, which makes it again"
            )
    names = [name for name in SEALED if name in seals]
    whole = lambda path: path.is_file() and digest(path) == seals[path.name]
    return [name for name in names if not whole(folder / name)]
