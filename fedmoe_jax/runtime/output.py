"""Output streams on which printing never fails."""

import io
import os
import sys
from collections.abc import Callable
from typing import TextIO


class Unfailing(io.RawIOBase):
    """Writes to a file descriptor until that fails, and then drops what is written.

    Args:
      number: the file descriptor, which stays open.
      on_fault: called with the first error of a write.
    """

    def __init__(self, number: int, on_fault: Callable[[OSError], None]) -> None:
        super().__init__()
        self._number, self._on_fault, self._failed = number, on_fault, False

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        try:
            return os.write(self._number, data)
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._on_fault(error)
            return len(data)


def wrap(stream: TextIO, on_fault: Callable[[OSError], None]) -> TextIO:
    """A line-buffered stream to where `stream` goes, on which writing never fails.

    Characters that its encoding lacks are written as `?`.
    """
    raw = Unfailing(stream.fileno(), on_fault)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=True,
    )


def secure(on_reader_gone: Callable[[], None]) -> None:
    """Replaces stdout and stderr by streams on which printing never fails.

    Args:
      on_reader_gone: called where the reader of stdout has left, as `head` does.
    """

    def mourn(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            on_reader_gone()
        else:
            print(f"warning: output is lost ({error.strerror})", file=sys.stderr)

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stdout = wrap(sys.stdout, mourn)
    sys.stderr = wrap(sys.stderr, lambda error: None)
