"""The folder of prepared data sets."""

from pathlib import Path

from fedmoe_jax.data.folders import resolve_data_dir


def test_resolve_data_dir_prefers_the_argument_to_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/shared")
    assert resolve_data_dir("given") == Path("given")
    assert resolve_data_dir("") == Path("/home/me/shared")
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    assert resolve_data_dir("") == Path("/home/me/tensorflow_datasets")
