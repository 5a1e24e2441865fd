"""Files that are whole or absent, and refused in one line if damaged."""

import contextlib
import hashlib
import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedmoe_jax.options import UserError


def plain(value: Any) -> Any:
    """`value` as strict JSON knows it.

    Arrays and tuples become lists, keys become strings, non-finite floats become None.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays, NumPy scalars
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`: every field under its dotted name."""
    flat = {}
    for name, value in tree.items():
        deeper = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return flat


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that becomes `path` when it is whole, and leaves nothing else.

    Processes that write the same path at once, on whatever machine, write it in turn.
    """
    part = Path(f"{path}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or all of the new one.

    Halves of surrogate pairs, as in arguments that are no UTF-8, become escapes.
    """
    with _writing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_atomically`, of what is no text."""
    with _writing(path) as file:
        file.write(data)


def write_json(path: Path, tree: Any) -> None:
    """Writes `config.json` and the like, whole or not at all; see `plain`."""
    write_atomically(path, json.dumps(plain(tree), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; restore it")
    return tree


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes an `.npz` file, whole or not at all."""
    with _writing(path) as file:
        np.savez(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an `.npz` file, each against its checksum.

    Raises:
      UserError: the file cannot be read or is damaged.
    """
    try:
        with Path(path).open("rb") as file, np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({brief(error)}); restore it, or remove it and give "
            "the run's command again, which makes it again"
        ) from None


def brief(error: Exception) -> str:
    """The error on one line of bearable length."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:160]}"


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
