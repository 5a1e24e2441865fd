"""Printing never fails, wherever it goes."""

import os
import subprocess
import sys

import pytest

from fedmoe_jax.runtime import output


def open_pipe(encoding):
    read, write = os.pipe()
    return read, os.fdopen(write, "w", encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "1 +- 2 - ? ..."),
        ("latin-1", "1 ± 2 - ? ..."),
        ("utf-8", "1 ± 2 – 😀 …"),
    ],
)
def test_wrap_spells_what_an_encoding_lacks(encoding, shown):
    read, stream = open_pipe(encoding)
    faults = []
    with stream:
        print("1 ± 2 – 😀 …", file=output.wrap(stream, faults.append))
    assert os.read(read, 99).decode(encoding) == f"{shown}\n" and faults == []


def test_spell_is_for_encoding_alone():
    error = UnicodeDecodeError("ascii", b"\xff", 0, 1, "no letter")
    with pytest.raises(UnicodeDecodeError):
        output.spell(error)


def test_the_program_spells_its_output():
    program = "import sys; from fedmoe_jax import launch; launch.app.run = "
    program += "lambda *args, **options: print('2 ± 1'); launch.start()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"2 +- 1\n"


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


def test_secure_wishes_to_stop_when_the_reader_has_left(monkeypatch):
    read, stream = open_pipe("utf-8")
    os.close(read)
    monkeypatch.setattr(sys, "stdout", stream)
    gone = []
    output.secure(on_reader_gone=lambda: gone.append(True))
    for _ in range(3):
        print("lost", flush=True)
    assert gone == [True]
    stream.close()


def test_a_program_without_output_ends_as_with_it():
    program = "from fedmoe_jax import launch; launch.app.run = "
    program += "lambda *args, **options: print('lost'); launch.start()"
    command = f"exec '{sys.executable}' -c \"{program}\" >&- 2>&-"
    assert subprocess.run(command, shell=True).returncode == 0
