"""The origins of a run's rounds, as several processes may have computed them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import plain, read_json, write_json
from fedmoe_jax.runtime.seals import ORIGINS

NUMERIC = {"jax", "jaxlib", "device", "xla_flags", "variables"}

Origin = dict[str, Any]  # of `find_origin`; empty where unknown


def read_origins(folder: Path) -> list[tuple[int, Origin]]:
    """The first round that each origin has computed, and the origin, in their order.

    An origin holds until the round before that of the next. The list is empty where a
    run has not begun, or did so before origins were kept.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / ORIGINS
    if not path.is_file():
        return []
    try:
        saved = read_json(path)
        listed = saved["origins"]
        if saved["sha256"] != digest_origins(listed):
            raise ValueError("it does not match its sha256")
        return [(int(each["first_round"]), dict(each["made_by"])) for each in listed]
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is damaged; allowed: that file restored, or removed, so that the "
            "origin of the rounds before is unknown"
        ) from None


def record_origin(folder: Path, done: int, origin: Origin) -> set[str]:
    """Writes what computes the rounds after the first `done` of a run.

    What an earlier process has computed beyond them is lost, and so is its entry. A
    process like the one before it gets none.

    Args:
      folder: of the run.
      done: rounds of the checkpoint that the process goes on from.
      origin: of this process.

    Returns:
      What differs from the origin before and may change numbers, such as `xla_flags`.

    Raises:
      UserError: see `read_origins`.
    """
    found = read_origins(folder) if done else []
    kept = [(first, made_by) for first, made_by in found if first <= done]
    if done and not kept:
        kept = [(1, {})]
    before = kept[-1][1] if kept else {}
    if not kept or before != plain(origin):
        kept.append((done + 1, origin))
    listed = plain(list_origins(kept))
    sealed = {"origins": listed, "sha256": digest_origins(listed)}
    write_json(folder / ORIGINS, sealed)
    return {name for name in NUMERIC & set(before) if before[name] != origin.get(name)}


def digest_origins(listed: list[dict[str, Any]]) -> str:
    """The sha256 of origins as they are listed."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def list_origins(origins: Sequence[tuple[int, Origin]]) -> list[dict[str, Any]]:
    """Origins as `origins.json` and `summary.json` have them."""
    return [{"first_round": first, "made_by": made_by} for first, made_by in origins]


def summarise_origins(folder: Path) -> dict[str, Any]:
    """`made_by` of the newest rounds and `origins` of all, for `summary.json`.

    Raises:
      UserError: see `read_origins`.
    """
    origins = read_origins(folder) or [(1, {})]
    return {"made_by": origins[-1][1], "origins": list_origins(origins)}
