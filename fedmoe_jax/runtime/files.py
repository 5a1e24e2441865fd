"""Files that are whole or absent, and JSON that is refused in one line if damaged."""

import json
import math
import os
from pathlib import Path
from typing import Any

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


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or all of the new one.

    Halves of surrogate pairs, as in arguments that are no UTF-8, become escapes.
    """
    part = Path(f"{path}.part")
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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
