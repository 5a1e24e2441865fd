"""Waves on disk: the runs whose states lie together in one folder of checkpoints."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime.files import read_json, write_json

MEMBERS = "members.json"
SUPERSEDED = "superseded"


def read_waves(checkpoints: Path) -> dict[Path, list[str]]:
    """The members of every wave that has begun, in their order, by its folder.

    Folders of older versions do not have them.

    Args:
      checkpoints: of a comparison, or none.

    Raises:
      UserError: a list is damaged.
    """
    files = sorted(checkpoints.glob(f"*/{MEMBERS}"))
    return {
        path.parent: read_members(path)
        for path in files
        if f".{SUPERSEDED}" not in path.parent.name
    }


def read_members(path: Path) -> list[str]:
    """The members of one wave.

    Raises:
      UserError: the file is damaged.
    """
    names = read_json(path).get("members")
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not names:
        raise UserError(
            f"{path} is damaged: members={show(names)}; allowed: the names of runs, "
            "restored"
        )
    return names


def list_unrecorded(checkpoints: Path) -> list[Path]:
    """The folders of waves without their members, as older versions leave them."""
    folders = [path.parent for path in checkpoints.glob("*-and-*/[0-9]*")]
    return [
        folder
        for folder in dict.fromkeys(folders)
        if not (folder / MEMBERS).is_file() and f".{SUPERSEDED}" not in folder.name
    ]


def begin_wave(folder: Path, names: Sequence[str]) -> None:
    """Records the members of a wave, unless it is one that goes on.

    Other waves that have one of them are set aside: their checkpoints do not fit the
    rows of a run that starts again.

    Args:
      folder: of the wave's checkpoints.
      names: of its members; their folders are owned.
    """
    for part in folder.glob("*.part"):  # of processes that were killed
        part.unlink()
    if (folder / MEMBERS).is_file():
        return
    for other, members in read_waves(folder.parent).items():
        if set(members) & set(names):
            set_aside(other)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MEMBERS, {"members": list(names)})


def set_aside(folder: Path) -> None:
    """Renames the checkpoints of a wave that is not to go on; nothing is deleted."""
    names = (f"{folder}.{SUPERSEDED}{n or ''}" for n in itertools.count())
    name = next(name for name in names if not Path(name).exists())
    print(f"{folder} is set aside as {Path(name).name}, as a run starts again")
    folder.rename(name)
