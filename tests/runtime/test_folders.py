"""Folders that a user names."""

from pathlib import Path

import pytest

from fedmoe_jax.data.folders import resolve_data_dir
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.folders import resolve_folder


def test_resolve_folder_expands_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("workdir", "~/runs/a") == tmp_path / "runs" / "a"
    assert resolve_folder("workdir", "a:b/c") == Path("a:b/c")  # a colon is no address


@pytest.mark.parametrize("folder", ["gs://bucket/data", "s3://b", "~nobody-here/data"])
def test_a_folder_elsewhere_is_refused_by_the_name_that_gave_it(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", folder)
    fault = f"={folder!r} is not allowed; allowed: a folder of this machine"
    with pytest.raises(UserError, match=f"^TFDS_DATA_DIR{fault}"):
        resolve_data_dir("")
    with pytest.raises(UserError, match=f"^data.dir{fault}"):
        resolve_data_dir(folder)
