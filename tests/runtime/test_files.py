"""Whole files, and JSON that is refused in one line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime import files


def test_write_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"loss": np.float32("nan"), "load": jnp.ones(2)})
    assert json.loads(path.read_text()) == {"loss": None, "load": [1.0, 1.0]}
    with pytest.raises(TypeError):
        files.write_json(path, {"bad": object()})
    assert files.read_json(path) == {"loss": None, "load": [1.0, 1.0]}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'"text"'])
def test_read_json_refuses_damaged_files_in_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        files.read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_read_json_refuses_absent_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path / "summary.json")


def test_flatten_joins_names_with_dots():
    assert files.flatten({"a": 1, "b": {"c": (2, 3), "d": {"e": "x"}}}) == {
        "a": 1,
        "b.c": (2, 3),
        "b.d.e": "x",
    }
