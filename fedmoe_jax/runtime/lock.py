"""Locks on folders, which end with the process that has them."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from fedmoe_jax.options import UserError

LOCK = "lock"
REPORT_LOCK = "report.lock"
# A file system without locks, as some cluster mounts are.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds a folder's lock, so that a second owner is refused at once.

    The kernel ends the lock with its process, and an NFS server with its client. The
    file stays, as removing it would let two owners have a lock each.

    Args:
      folder: existing.
      shared: whether others that share the folder, too, are welcome.

    Raises:
      UserError: another process has the folder; names it.
      OSError: the file cannot be written.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"workdir={folder} is in use by {owner}; allowed: another folder, or "
                "the same call when that one has ended"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(
                f"warning: the file system of {folder} has no locks; nothing else may "
                "write there until this call has ended",
                file=sys.stderr,
            )
        file.truncate(0)  # of the name of an owner that has ended
        if not shared:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def take_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process writes the report of a folder.

    Raises:
      OSError: the lock's file cannot be written.
    """
    with (folder / REPORT_LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield
