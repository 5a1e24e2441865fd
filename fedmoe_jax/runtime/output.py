"""Output streams on which printing never fails, whatever the terminal can show."""

import codecs
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

PLAIN = {"±": "+-", "–": "-", "…": "..."}  # of the package's own tables
SPELL = "fedmoe_jax.spell"


def spell(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: letters that an encoding lacks, in ASCII.

    Raises:
      UnicodeError: something else than encoding has failed.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in letters), error.end


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

    Letters that its encoding lacks are spelt, see `spell`.
    """
    codecs.register_error(SPELL, spell)
    raw = Unfailing(stream.fileno(), on_fault)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=SPELL,
        line_buffering=True,
    )


def open_missing() -> None:
    """Sends what a process was started without, as by `>&-`, to nowhere."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")


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
