"""Decoded arrays on disk: written whole or not at all, each byte checked on reading."""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmoe_jax.runtime.files import brief, digest
from fedmoe_jax.runtime.xla import find_caches


def cache_folders(source: Path, keys: Sequence[str] = ()) -> tuple[Path, ...]:
    """The folders for decoded arrays of exactly these records, by preference.

    Args:
      source: folder of the records, `NAME/VERSION`.
      keys: of the features that are decoded, where they are not the data set's own.
    """
    name = source.parent.name
    stats = [(path.name, path.stat()) for path in sorted(source.glob("*array_record*"))]
    stamp: list = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    stamp += keys
    caches, named = find_caches(), [str(source.resolve()), *stamp]
    folders = [source / "fedmoe_jax" / _short_hash(stamp)]
    if caches is not None:
        folders.append(caches / f"{name}-{_short_hash(named)}")
    return tuple(folders)


def _short_hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def keep_decoded(folders: tuple[Path, ...], arrays: dict[str, np.ndarray]) -> None:
    """Writes to the first folder that can be written; if there is none, says so."""
    faults = []
    for folder in folders:
        try:
            return write_cache(folder, arrays)
        except OSError as error:
            faults.append(brief(error))
    print(f"warning: decoded images are not kept ({faults[0]})", file=sys.stderr)


def write_cache(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes through a temporary folder, so that `folder` is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as temporary:
        part = Path(temporary) / folder.name
        part.mkdir()
        for field, value in arrays.items():
            np.save(part / f"{field}.npy", np.asarray(value))
        digests = {path.name: digest(path) for path in part.iterdir()}
        (part / "sha256.json").write_text(json.dumps(digests))
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def find_decoded(
    folders: tuple[Path, ...], names: tuple[str, ...]
) -> dict[str, np.ndarray] | None:
    """The arrays of the first whole copy; None where there is none.

    A damaged copy is removed, with a warning, so that it can be made again.
    """
    for folder in folders:
        try:
            if folder.exists():
                return read_cache(folder, names)
        except ValueError as error:
            print(
                f"warning: decoded images in {folder} are damaged ({error}), they are "
                "decoded again",
                file=sys.stderr,
            )
            shutil.rmtree(folder, ignore_errors=True)
    return None


def read_cache(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads the arrays of these names and checks every byte of them.

    Raises:
      ValueError: the copy is damaged.
    """
    try:
        digests = json.loads((folder / "sha256.json").read_text())
        arrays = {}
        for name in names:
            path = folder / f"{name}.npy"
            if digest(path) != digests[path.name]:
                raise ValueError(f"{path.name} does not match its sha256")
            arrays[name] = np.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(brief(error)) from error
    return arrays
