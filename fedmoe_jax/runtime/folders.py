"""Folders that a user names."""

import re
from pathlib import Path

from fedmoe_jax.options import UserError


def resolve_folder(name: str, folder: str | Path) -> Path:
    """The folder that a user names, with `~` expanded.

    Args:
      name: of the flag or argument, for the message.
      folder: as the user gives it.

    Raises:
      UserError: it is empty, an address such as gs://bucket, or of a user without home.
    """
    fault = f"{name}={str(folder)!r} is not allowed; allowed: a folder of this machine"
    if not str(folder).strip():
        raise UserError(fault)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(folder)):
        raise UserError(f"{fault}, copied from or to its address by hand")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UserError(f"{fault}; ~ has no home here") from None
