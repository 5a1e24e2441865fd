"""Output to terminals that cannot show every letter."""

import io
import os
import subprocess
import sys

import pytest

from fedmoe_jax.runtime import streams


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "1 +- 2 - ? ..."),
        ("latin-1", "1 ± 2 - ? ..."),
        ("utf-8", "1 ± 2 – 😀 …"),
    ],
)
def test_spell_output_replaces_what_an_encoding_lacks(monkeypatch, encoding, shown):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding=encoding))
    streams.spell_output()
    print("1 ± 2 – 😀 …", end="", flush=True)
    assert file.getvalue().decode(encoding) == shown


def test_spell_output_leaves_other_streams_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    streams.spell_output()
    print("±", end="")
    assert stream.getvalue() == "±"


def test_spell_is_for_encoding_alone():
    error = UnicodeDecodeError("ascii", b"\xff", 0, 1, "no letter")
    with pytest.raises(UnicodeDecodeError):
        streams.spell(error)


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
