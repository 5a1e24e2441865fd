"""Waves are recorded when they begin, and a run is in one of them."""

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.train.waves import begin_wave, list_unrecorded, read_waves


def test_a_wave_is_recorded_once(tmp_path):
    folder = tmp_path / "checkpoints" / "a-and-1-0"
    assert read_waves(folder.parent) == {}
    begin_wave(folder, ["b", "a"])
    (folder / "members.json.0.part").touch()
    begin_wave(folder, ["b", "a"])
    assert [path.name for path in folder.iterdir()] == ["members.json"]
    assert read_waves(folder.parent) == {folder: ["b", "a"]}


def test_a_wave_that_begins_sets_aside_those_with_its_runs(tmp_path, capsys):
    names = {"one": ["a", "b"], "two": ["c"], "three": ["b", "d"]}
    for name, members in names.items():
        begin_wave(tmp_path / name, members)
        (tmp_path / name / "4").mkdir()
    assert read_waves(tmp_path) == {
        tmp_path / "two": ["c"],
        tmp_path / "three": ["b", "d"],
    }
    assert (tmp_path / "one.superseded" / "4").is_dir()  # nothing is deleted
    assert "one is set aside as one.superseded" in capsys.readouterr().out
    begin_wave(tmp_path / "one", ["d"])
    begin_wave(tmp_path / "five", ["d"])
    assert (tmp_path / "one.superseded1").is_dir()


def test_unrecorded_waves_have_a_step_and_no_members(tmp_path):
    for name in ("a-and-1-0", "b-and-1-0", "c-and-1-0", "d-and-1-0.superseded"):
        (tmp_path / name).mkdir()
    begin_wave(tmp_path / "b-and-1-0", ["b"])
    for name in ("a-and-1-0", "b-and-1-0", "d-and-1-0.superseded"):
        (tmp_path / name / "20").mkdir()
    assert list_unrecorded(tmp_path) == [tmp_path / "a-and-1-0"]


@pytest.mark.parametrize(
    "text", ['["a', "[]", "{}", '{"members": 3}', '{"members": []}', '{"members": [3]}']
)
def test_a_damaged_list_is_named(tmp_path, text):
    begin_wave(tmp_path / "one", ["a"])
    path = tmp_path / "one" / "members.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} (cannot be read|is damaged)"):
        read_waves(tmp_path)
