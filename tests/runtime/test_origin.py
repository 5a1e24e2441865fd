"""The commit of a folder of sources: none where it belongs to something else."""

import os
import platform
import subprocess

import jax
import pytest

from fedmoe_jax.runtime import origin

AUTHOR = {
    f"GIT_{role}_{field}": "a@b.c"
    for role in ("AUTHOR", "COMMITTER")
    for field in ("NAME", "EMAIL")
}


def git(folder, *words):
    environment = os.environ | AUTHOR
    subprocess.run(["git", "-C", folder, *words], check=True, env=environment)


@pytest.fixture
def sources(tmp_path):
    """A package in a checkout, committed."""
    folder = tmp_path / "project" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_commit_and_whether_the_sources_differ_from_it(sources):
    commit, dirty = origin.find_commit(sources)
    assert len(commit) == 40 and int(commit, 16) and dirty is False
    (sources.parent / "notes.txt").write_text("not a source")
    assert origin.find_commit(sources) == (commit, False)
    (sources / "new.py").write_text("")
    assert origin.find_commit(sources) == (commit, True)


def test_no_commit_without_a_checkout(sources, tmp_path, monkeypatch):
    assert origin.find_commit(tmp_path) == (None, None)
    installed = sources.parent / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert origin.find_commit(installed) == (None, None)  # the project does not own it
    monkeypatch.setenv("PATH", "")
    assert origin.find_commit(sources) == (None, None)


def test_origin_names_versions_device_and_flags(monkeypatch):
    kind = jax.devices()[0].device_kind  # before JAX reads the flags
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    found = origin.find_origin.__wrapped__()
    assert found["jax"] == jax.__version__
    assert found["python"] == platform.python_version()
    assert found["device"] == kind
    assert found["xla_flags"] == "--xla_a=1"
    assert found["variables"] == "NVIDIA_TF32_OVERRIDE=0"
    names = {"commit", "dirty", "fedmoe_jax", "python", "jax", "jaxlib"}
    assert found.keys() == names | {*("device", "xla_flags", "variables", "settings")}
