"""Printing never fails, wherever it goes."""

import os
import sys

from fedmoe_jax.runtime import output


def open_pipe(encoding):
    read, write = os.pipe()
    return read, os.fdopen(write, "w", encoding=encoding)


def test_wrap_writes_a_question_mark_for_what_the_encoding_lacks():
    read, stream = open_pipe("ascii")
    faults = []
    with stream:
        print("±1 – ok", file=output.wrap(stream, faults.append))
    assert os.read(read, 99) == b"?1 ? ok\n" and faults == []


def test_wrap_tells_of_a_reader_that_has_left_once():
    read, stream = open_pipe("utf-8")
    os.close(read)
    faults = []
    with stream:
        wrapped = output.wrap(stream, faults.append)
        for _ in range(3):
            print("lost", file=wrapped, flush=True)
    assert [type(fault) for fault in faults] == [BrokenPipeError]


def test_secure_takes_a_full_disk_for_no_reason_to_stop(monkeypatch):
    read, errors = open_pipe("utf-8")
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", errors)
    gone = []
    output.secure(on_reader_gone=lambda: gone.append(True))
    print("lost")
    assert os.read(read, 99) == b"warning: output is lost (No space left on device)\n"
    assert gone == []
    full.close()
    errors.close()
