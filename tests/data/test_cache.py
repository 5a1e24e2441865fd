"""Decoded arrays are kept whole or not at all, and every byte is checked."""

import os
from pathlib import Path

import numpy as np
import pytest

from fedmoe_jax.data.cache import (
    brief,
    cache_folders,
    find_decoded,
    keep_decoded,
    read_cache,
    write_cache,
)

ARRAYS = {"x": np.arange(6, dtype=np.uint8).reshape(3, 2), "y": np.array([2, 0, 1])}


def test_cache_folders_belong_to_exactly_these_records(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    sources = [tmp_path / name / "mnist" / "1.0.0" for name in ("one", "two")]
    for source in sources:
        source.mkdir(parents=True)
        (source / "cifar10-train.array_record").write_bytes(b"records")
        os.utime(source / "cifar10-train.array_record", ns=(1, 1))
    (beside, mine), (beside_two, mine_two) = map(cache_folders, sources)
    assert beside.parent == sources[0] / "fedmoe_jax"
    assert mine.parent == tmp_path / "home" / "fedmoe_jax"
    assert mine.name.startswith("mnist-")
    other = cache_folders(sources[0], ["image", "coarse_label"])
    assert len({*other, beside, mine}) == 4
    # Equal records have equal stamps; in the user's folder the place counts, too.
    assert beside.name == beside_two.name and mine != mine_two
    (sources[0] / "notes.txt").write_text("no records")
    assert cache_folders(sources[0]) == (beside, mine)
    os.utime(sources[0] / "cifar10-train.array_record", ns=(2, 2))
    changed = cache_folders(sources[0])
    assert changed[0] != beside and changed[1] != mine


def test_keep_decoded_takes_the_first_folder_that_can_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    blocked, free = tmp_path / "file" / "kept", tmp_path / "free" / "kept"
    keep_decoded((blocked, free, tmp_path / "never"), ARRAYS)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(read_cache(free, ("x",))["x"], ARRAYS["x"])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "free"}


def test_keep_decoded_warns_once_where_no_folder_can_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    keep_decoded((tmp_path / "file" / "a", tmp_path / "file" / "b"), ARRAYS)
    told = "warning: decoded images are not kept (FileExistsError: "
    assert capsys.readouterr().err.startswith(told)


def test_write_cache_leaves_nothing_where_it_is_interrupted(tmp_path, monkeypatch):
    def fail(path, value):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError):
        write_cache(tmp_path / "kept", ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_write_cache_of_two_writers_leaves_one_whole_copy(tmp_path):
    for _ in range(2):
        write_cache(tmp_path / "kept", ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    found = read_cache(tmp_path / "kept", ("x", "y"))
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_read_cache_checks_the_arrays_that_are_asked_for(tmp_path):
    write_cache(tmp_path / "kept", ARRAYS)
    content = bytearray((tmp_path / "kept" / "x.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "kept" / "x.npy").write_bytes(content)
    np.testing.assert_array_equal(read_cache(tmp_path / "kept", ("y",))["y"], [2, 0, 1])
    with pytest.raises(ValueError, match="x.npy does not match its sha256"):
        read_cache(tmp_path / "kept", ("y", "x"))
    with pytest.raises(ValueError, match="z.npy"):
        read_cache(tmp_path / "kept", ("z",))


def test_find_decoded_takes_the_first_whole_copy_and_removes_others(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert find_decoded((first, second), ("x",)) is None
    for folder in (first, second):
        write_cache(folder, ARRAYS)
    (first / "x.npy").write_bytes(b"")
    found = find_decoded((first, second), ("x",))
    assert found is not None and found["x"].tolist() == ARRAYS["x"].tolist()
    assert not first.exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"in {first} are damaged (ValueError: " in told


def test_brief_is_one_line_of_bearable_length():
    assert brief(ValueError("\n first \n second")) == "ValueError: first "
    assert brief(OSError()) == "OSError: no message"
    assert brief(KeyError("a" * 999)) == "KeyError: '" + "a" * 159
