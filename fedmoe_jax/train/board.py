"""TensorBoard events, a convenience: a write that fails ends them, not the run.

They are written as rows come, by tensorboardX's own file format but without its thread,
which hangs the program when the disk is full.
"""

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from fedmoe_jax.report.rows import Row


@contextlib.contextmanager
def open_board(folder: Path, done: int) -> Iterator[Callable[[Row], None]]:
    """Yields `show(row)`, which appends a row's numbers to the events in `folder`.

    Finite scalars have their key as tag and vectors `key/0`, `key/1`, ...; arrays of
    more axes are left out. The first write that fails is warned of and is the last.

    Args:
      folder: an existing folder.
      done: rounds done before; TensorBoard hides later events of an earlier process.
    """
    writers: list[RecordWriter] = []

    def attempt(act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            print(
                f"warning: no more TensorBoard events in {folder} ({error.strerror})",
                file=sys.stderr,
            )
            for writer in writers:
                with contextlib.suppress(OSError):
                    writer.close()
            writers.clear()

    def begin() -> None:
        # The last part keeps apart the files of processes that start in one second.
        now, host = int(time.time()), socket.gethostname()
        path = folder / f"events.out.tfevents.{now}.{host}.{done}"
        writers.append(RecordWriter(str(path)))
        _write(writers[0], file_version="brain.Event:2")
        log = SessionLog(status=SessionLog.START)
        _write(writers[0], step=done + 1, session_log=log)

    def show(row: Row) -> None:
        if writers:
            summary = Summary(value=list(_list_values(row)))
            attempt(lambda: _write(writers[0], step=row["round"], summary=summary))

    def end() -> None:
        for writer in writers:
            writer.close()

    attempt(begin)
    try:
        yield show
    finally:
        attempt(end)


def _write(writer: RecordWriter, **fields: Any) -> None:
    writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
    writer.flush()


def _list_values(row: Row) -> Iterator[Summary.Value]:
    for key, value in row.items():
        values = np.asarray(value)
        if key == "round" or values.dtype.kind not in "biuf" or values.ndim > 1:
            continue
        for index, number in np.ndenumerate(values):
            if np.isfinite(number):
                tag = "/".join([key, *map(str, index)])
                yield Summary.Value(tag=tag, simple_value=float(number))
