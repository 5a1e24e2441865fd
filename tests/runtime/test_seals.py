"""Seals of a finished run: what they cover, and what is not as it was sealed."""

import json

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.seals import RESULTS, SEALED, find_broken, is_sealed, seal


@pytest.fixture
def folder(tmp_path):
    for name in SEALED:
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    return tmp_path


def drop(folder, name):
    """A seal without one of its files."""
    seals = json.loads((folder / "sha256.json").read_text())
    del seals[name]
    (folder / "sha256.json").write_text(json.dumps(seals))


@pytest.mark.parametrize("name", SEALED)
def test_find_broken_names_what_is_missing_or_other(folder, name):
    assert find_broken(folder) == []
    (folder / name).write_text("other")
    assert find_broken(folder) == [name]
    (folder / name).unlink()
    assert find_broken(folder) == [name]


@pytest.mark.parametrize("name", RESULTS)
def test_a_seal_that_lacks_a_result_is_damaged(folder, name):
    drop(folder, name)
    with pytest.raises(UserError, match=f"sha256.json is damaged: it has no {name}"):
        find_broken(folder)


def test_a_seal_of_an_older_version_does_not_have_the_config(folder):
    drop(folder, "config.json")
    (folder / "config.json").write_text("other")
    assert find_broken(folder) == []


def test_a_run_without_seals_has_nothing_broken(folder):
    (folder / "sha256.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert not is_sealed(folder) and find_broken(folder) == []
