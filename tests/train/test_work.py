"""Work that is left: waves go on whole, each in one part."""

import json

import pytest
from factories import tiny_study

from fedmoe_jax.runtime.files import plain
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.waves import begin_wave
from fedmoe_jax.train.work import find_work, recall


@pytest.fixture
def members():
    return list_members(tiny_study(("random",), seeds=(0, 1, 2, 3)))


def begin(workdir, members):
    """A wave of these runs that has rows."""
    for name, config in members:
        folder = workdir / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(plain(config.to_dict())))
        (folder / "metrics.jsonl").touch()
    names = [member.name for member in members]
    begin_wave(workdir / "checkpoints" / names[0], names)
    return names


def names_of(members):
    return [member.name for member in members]


def look(workdir, members, mine, older=None):
    return find_work(workdir, members, mine, lambda _: older or {})


def test_all_is_left_of_a_new_comparison(tmp_path, members):
    work = look(tmp_path / "new", members, members[1:])
    assert work.members == work.mine == members[1:] and work.begun == []
    assert not (tmp_path / "new").exists()


def test_a_wave_goes_on_in_its_own_order_before_the_rest(tmp_path, members):
    begun = begin(tmp_path, [members[2], members[1]])
    work = look(tmp_path, members, members)
    assert work.begun == [begun]
    assert names_of(work.members) == [*begun, members[0].name, members[3].name]


def test_a_wave_recalls_runs_that_are_not_asked_for(tmp_path, members):
    begun = begin(tmp_path, members[:2])
    wanted = list_members(tiny_study(("random",), seeds=(1, 3), num_rounds=8))
    work = look(tmp_path, wanted, wanted)
    assert work.begun == [begun] and work.mine == wanted
    configs = dict(work.members)
    assert configs[begun[0]].num_rounds == 8 and configs[begun[0]].seed == 0


def test_a_wave_is_in_the_part_of_its_first_run(tmp_path, members):
    begun = begin(tmp_path, members[1:3])
    first = look(tmp_path, members, members[:2])
    second = look(tmp_path, members, members[2:])
    assert first.begun == [begun] and first.mine == members[:2]
    assert names_of(first.members) == [*begun, members[0].name]
    assert second.begun == [] and second.mine == second.members == members[3:]


@pytest.mark.parametrize("removed", [1, 2])
def test_a_wave_whose_runs_were_removed_does_not_go_on(tmp_path, members, removed):
    for name in begin(tmp_path, members[:2])[:removed]:
        (tmp_path / "runs" / name / "metrics.jsonl").unlink()
    assert look(tmp_path, members, members).begun == []


def test_waves_of_older_versions_count_as_well(tmp_path, members):
    names = begin(tmp_path, members[:2])
    (tmp_path / "checkpoints" / names[0] / "members.json").unlink()
    older = {tmp_path / "checkpoints" / names[0]: names}
    assert look(tmp_path, members, members, older).begun == [names]


def test_recall_takes_only_the_fields_that_may_change(tmp_path, members):
    begin(tmp_path, members[:1])
    like = members[1].config
    like.num_rounds, like.fitness.rate, like.fedmoe.period = 8, 0.9, 9
    found = recall(tmp_path / "runs" / members[0].name, like)
    assert (found.num_rounds, found.fedmoe.period, found.seed) == (8, 9, 0)
    assert found.fitness.rate != 0.9


def test_recall_keeps_the_fields_of_its_own_strategy(tmp_path):
    mixed = list_members(tiny_study(("flex_moe", "random")))
    begin(tmp_path, mixed[:1])
    like = next(m.config for m in mixed if m.config.strategy == "random")
    like.flex_moe.low = 0.5
    found = recall(tmp_path / "runs" / mixed[0].name, like)
    assert found.strategy == "flex_moe" and found.flex_moe.low == 0.8
