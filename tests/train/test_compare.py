"""A comparison is its members: named, independent, run together and resumed."""

import contextlib
import json
import re
import shutil

import jax
import pytest
from factories import SMALL, USERS_OPTIONS, assert_same_results, never, run_alone
from ml_collections import ConfigDict

import fedmoe_jax
from configs import compare as study
from configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.train import loop, plan
from fedmoe_jax.train.compare import (
    apply_change,
    check_given,
    compare,
    list_members,
    split_change,
)

TINY = SMALL | {
    "checkpoint.every": 1,
    "compare.strategies": ("load_balanced",),
    "compare.seeds": (0,),
}


def tiny_config(**changes):
    config = study.get_config("digits,smoke")
    config.update_from_flattened_dict(TINY | changes)
    config.lock()  # as it comes from the command line
    return config


def members_of(**changes):
    fields = {f"compare.{name}": tuple(value) for name, value in changes.items()}
    return list_members(tiny_config(**fields))


def test_list_members_is_strategies_times_changes_times_seeds():
    members = members_of(
        strategies=("greedy", "random"),
        changes=("", "fitness.idle=keep"),
        seeds=(0, 7),
    )
    assert [member.name for member in members] == [
        "greedy-seed0",
        "greedy-seed7",
        "random-seed0",
        "random-seed7",
        "greedy-fitness.idle=keep-seed0",
        "greedy-fitness.idle=keep-seed7",
        "random-fitness.idle=keep-seed0",
        "random-fitness.idle=keep-seed7",
    ]
    for name, config in members:
        strategy, seed = name.split("-")[0], int(name[-1])
        assert (config.strategy, config.seed) == (strategy, seed)
        assert config.fitness.idle == ("keep" if "keep" in name else "prior")
        assert "compare" not in config


def test_list_members_changes_their_own_members_only():
    config = tiny_config(**{"compare.changes": ("weights.usage=2", "client.prox=1")})
    before = config.to_dict()
    first, second = (member.config.to_dict() for member in list_members(config))
    assert config.to_dict() == before
    differing = {k for k, v in flatten(first).items() if flatten(second)[k] != v}
    assert differing == {"weights.usage", "client.prox"}


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ("num_experts=5", "num_experts", 5),
        ("client.prox=1", "client.prox", 1.0),
        ("partition.alpha=1e-2", "partition.alpha", 0.01),
        ("gate.mode=personal", "gate.mode", "personal"),
        ("data.dir=a=b", "data.dir", "a=b"),
    ],
)
def test_apply_change_keeps_the_type_of_the_field(change, name, value):
    (member,) = members_of(changes=(change,))
    found = flatten(member.config.to_dict())[name]
    assert found == value and type(found) is type(value)
    assert member.name == f"load_balanced-{change}-seed0"


@pytest.mark.parametrize(
    "change",
    [
        "bogus=1",
        "fitness=1",
        "num_rounds",
        "num_rounds=",
        "num_rounds=4.5",
        "num_rounds=many",
        "client.prox=much",
        "devices.tiers=phone",
        "run.tensorboard=False",  # bool("False") is true
        "strategy=random",
        "seed=1",
        "compare.seeds=3",
    ],
)
def test_apply_change_refuses_what_makes_no_sense(change):
    with pytest.raises(UserError) as caught:
        members_of(changes=("", change))
    text = str(caught.value)
    assert text.startswith(f"compare.changes has {change!r}; allowed: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"strategies": ("random", "bogus")}, "strategy='bogus' is unknown; allowed: "),
        ({"seeds": (0, -1)}, "compare.seeds=.*-1.* is not allowed"),
        ({"seeds": ("a",)}, "compare.seeds=.'a',. is not .* allowed: whole numbers"),
        ({"seeds": (0.5,)}, "compare.seeds=.0.5,. is not .* allowed: whole numbers"),
        ({"seeds": (True,)}, "compare.seeds=.True,. is not .* allowed: whole numbers"),
        ({"seeds": (2**31,)}, "compare.seeds=.*2147483648.*; allowed: whole"),
        ({"strategies": (1,)}, "compare.strategies=.1,. is not .* allowed: names"),
        ({"changes": (None,)}, "compare.changes=.None,. is not .* allowed: changes"),
        ({"changes": ("max_held=9",)}, "max_held=9 is not allowed"),
        ({"seeds": (0, 0)}, "compare.seeds=.0, 0. is not .* none twice"),
        ({"strategies": ("random", "greedy", "random")}, "strategies.* none twice"),
        ({"changes": ("", "")}, "compare.changes=.* none twice"),
        ({"changes": ("", "fitness.rate=0.3")}, "-seed0 and .*=0.3-seed0, .* same run"),
        ({"changes": ("client.prox=1", "client.prox=1.0")}, "are the same run; allow"),
        ({"seeds": ()}, "compare.seeds=.. is not allowed; .* at least one"),
        ({"strategies": ()}, "compare.strategies=.. is not allowed; .* at least one"),
        ({"changes": ()}, "compare.changes=.. is not allowed; .* at least one"),
    ],
)
def test_list_members_refuses_what_is_not_allowed(fields, told):
    with pytest.raises(UserError, match=told):
        members_of(**fields)


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"strategies": "greedy"}, "compare.strategies='greedy' is not allowed"),
        ({"seeds": 0}, "compare.seeds=0 is not allowed; allowed: whole numbers"),
        ({"changes": None}, "compare.changes=None is not allowed; allowed: changes"),
        ({"sedes": (0,)}, "compare.sedes is unknown; allowed: strategies, changes"),
        (None, "compare.changes is missing; allowed: strategies, changes, seeds"),
    ],
)
def test_the_lists_are_of_their_kind(lists, told):
    fields = tiny_config().to_dict()
    fields["compare"] = lists and fields["compare"] | lists
    with pytest.raises(UserError, match=told):
        list_members(ConfigDict(fields))


def test_a_comma_separates_before_a_field_alone():
    assert split_change("devices.csv=a,b.csv") == ["devices.csv=a,b.csv"]
    assert split_change("data.dir=a,b=c,fitness.rate=0.5,seed=3") == [
        "data.dir=a,b=c",
        "fitness.rate=0.5",
        "seed=3",
    ]
    assert split_change("") == [] and split_change("num_experts=5,") == [
        "num_experts=5"
    ]


def names_of(*changes, **more):
    return [member.name for member in members_of(changes=changes, **more)]


def test_names_are_folders_of_their_own_whatever_the_change(tmp_path):
    long = "data.dir=" + 300 * "x"
    changes = ("data.dir=../../d", "data.dir=../../e", "data.dir=.._.._d", long)
    changes += (f"{long}y", "data.dir=ä b\n", "data.dir=A", "data.dir=a")
    names = names_of(*changes, seeds=(2**31 - 1,))
    assert len({name.lower() for name in names}) == len(changes)
    for name, change in zip(names, changes, strict=True):
        assert re.fullmatch(r"load_balanced-[\w.=-]+-seed2147483647", name, re.ASCII)
        assert len(name) < 120
        (tmp_path / name).mkdir()
        plain = f"load_balanced-{change}-seed2147483647"
        assert (name == plain) == (change in ("data.dir=.._.._d", "data.dir=a"))
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_name_depends_on_no_other_change():
    wild = "data.dir=a/b"
    assert names_of(wild)[0] == names_of("", "data.dir=a_b", wild)[-1]
    grid = "fitness.rate=0.5,usage.decay=0.25"  # as older studies have them
    assert names_of(grid) == [f"load_balanced-{grid}-seed0"]


def test_a_member_has_all_of_a_change_that_is_no_name():
    (member,) = members_of(changes=("data.dir=../a, b/c",))
    assert member.config.data.dir == "../a, b/c"


def test_apply_change_is_in_place():
    (member,) = members_of()
    apply_change(member.config, "local_steps=9")
    assert member.config.local_steps == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("partition.min_size", 400),
        ("model.expert", "conv"),
        ("run.num_devices", 9),
        ("run.memory_limit_gb", 1e-5),
        ("compare.strategies", ("load_balanced", "bogus")),
    ],
)
def test_compare_leaves_no_trace_of_what_is_refused(tmp_path, field, value):
    told = "strategy" if field.startswith("compare") else field
    with pytest.raises(UserError, match=told):
        compare(
            tiny_config(**{field: value}), tmp_path / "new", stop=never, profile=False
        )
    assert list(tmp_path.iterdir()) == []


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_compare_resumes_where_it_stopped(tmp_path, capsys):
    fields = {
        "compare.strategies": ("random", "greedy", "fedavg"),
        "compare.seeds": (0, 1),
    }
    config = tiny_config(**fields)
    names = [f"{s}-seed{i}" for s in ("random", "greedy", "fedavg") for i in (0, 1)]
    folders = [tmp_path / "runs" / name for name in names]

    # Mixtures share a program, dense controls have their own: stop within the second.
    finished, whole = compare(
        config,
        tmp_path,
        stop=(folders[4] / "metrics.jsonl").exists,
        profile=False,
    )
    assert (finished, whole) == (folders[:4], False)
    assert not (folders[4] / "summary.json").exists()
    told = capsys.readouterr().out
    assert "[1/2] 4 runs as one program on 1 x 1 devices" in told
    assert (
        "[2/2] 2 runs as one program" in told and "greedy (2 seeds)  round 4/4" in told
    )

    # The finished members are neither run nor touched again.
    before = [snapshot(folder) for folder in folders[:4]]
    assert compare(config, tmp_path, stop=never, profile=False) == (folders, True)
    assert "[1/1] 2 runs as one program" in capsys.readouterr().out
    assert [snapshot(folder) for folder in folders[:4]] == before

    seeds = [json.loads((f / "config.json").read_text())["seed"] for f in folders]
    assert seeds == [0, 1] * 3
    summaries = [json.loads((f / "summary.json").read_text()) for f in folders]
    assert [summary["num_rounds"] for summary in summaries] == [4] * 6
    assert [s["strategy"] for s in summaries] == [name.split("-")[0] for name in names]
    assert len({s["final_global_accuracy"] for s in summaries}) > 1

    # More rounds are run on top of the finished ones.
    longer = tiny_config(**fields, num_rounds=6)
    rows = (folders[0] / "metrics.jsonl").read_text()
    assert compare(longer, tmp_path, stop=never, profile=False) == (folders, True)
    assert json.loads((folders[0] / "summary.json").read_text())["num_rounds"] == 6
    assert (folders[0] / "metrics.jsonl").read_text().startswith(rows)


@pytest.mark.slow
def test_compare_refuses_the_folder_of_another_comparison(tmp_path):
    compare(tiny_config(), tmp_path, stop=never, profile=False)
    before = snapshot(tmp_path)
    other = tiny_config(**{"compare.seeds": (0, 1), "batch_size": 5})
    with pytest.raises(UserError, match="batch_size: 4 -> 5; allowed"):
        compare(other, tmp_path, stop=never, profile=False)
    assert snapshot(tmp_path) == before


def rows_in(folder):
    return len(read_metrics(folder / "metrics.jsonl"))


# Strategies, traced hyperparameters and seeds in one program; personal gates and a
# server optimiser with moments have the most state.
MIXED = {
    "compare.strategies": ("load_balanced_running", "random"),
    "compare.changes": ("", "weights.usage=0.9,fitness.rate=0.7,fitness.prior=0.8"),
    "compare.seeds": (3, 1, 0),
    "num_rounds": 6,
    "gate.mode": "personal",
    "server.optimizer": "adam",
    "chunk_rounds": 2,
    "checkpoint.every": 4,
}
# What is frozen, and between rounds, is each run's own.
STAGED = {
    "compare.strategies": ("fedjets",),
    "compare.seeds": (0, 3),
    "data.public": 50,
}


@pytest.fixture(scope="module")
def users_programs():
    """What these tests compile as users do, apart from what others compile."""
    programs = {}
    yield programs
    programs.clear()


@contextlib.contextmanager
def compile_as_users(programs):
    """Programs are compiled as users compile them, unless `programs` has them."""
    compile = jax.stages.Lowered.compile
    as_users = lambda lowered: compile(lowered, USERS_OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", as_users)
        patch.setattr(loop, "_compiled", programs)
        yield


@pytest.fixture
def users_flags(users_programs):
    with compile_as_users(users_programs):
        yield


@pytest.fixture(scope="module")
def mixed(users_programs, tmp_path_factory):
    """The folder of every run of `MIXED` by its name, all run at once."""
    workdir = tmp_path_factory.mktemp("mixed")
    with compile_as_users(users_programs):
        folders, whole = compare(
            tiny_config(**MIXED), workdir, stop=never, profile=False
        )
    assert whole and len(list((workdir / "checkpoints").iterdir())) == 1
    assert len(folders) == 12
    return {folder.name: folder for folder in folders}


@pytest.mark.slow
def test_compare_gives_every_run_as_it_is_alone_bitwise(users_flags, mixed, tmp_path):
    config = tiny_config(**MIXED | {"compare.seeds": (0, 3)})
    for name, member in list_members(config):
        assert run_alone(member, tmp_path / name)
        assert_same_results(mixed[name], tmp_path / name)


@pytest.mark.slow
def test_parts_that_share_a_folder_are_the_whole(users_flags, mixed, tmp_path):
    config = tiny_config(**MIXED | {"compare.changes": ("",), "compare.seeds": (0,)})
    found = []
    for number in (2, 1):  # any order
        part, whole = compare(
            config, tmp_path, stop=never, profile=False, part=(number, 2)
        )
        assert whole and part
        found += part
    names = [member.name for member in list_members(config)]
    assert sorted(f.name for f in found) == sorted(names)
    for name in names:
        assert_same_results(tmp_path / "runs" / name, mixed[name])
    before = snapshot(tmp_path)
    assert compare(config, tmp_path, stop=never, profile=False)[1]
    assert snapshot(tmp_path) == before | {
        tmp_path / "lock": (tmp_path / "lock").read_bytes()  # names its last owner
    }


@pytest.mark.slow
def test_a_comparison_that_grows_is_the_one_run_at_once_bitwise(
    users_flags, mixed, tmp_path
):
    """More seeds, strategies, changes and rounds, of one that was stopped twice."""
    small = {"compare.strategies": ("random",), "compare.changes": ("",)}
    small |= {"compare.seeds": (0, 1), "num_rounds": 4}
    runs = tmp_path / "runs"
    halfway = lambda: rows_in(runs / "random-seed0") >= 2
    config = tiny_config(**MIXED | small)
    first, whole = compare(config, tmp_path, stop=halfway, profile=False)
    assert (first, whole) == ([], False)
    before = (runs / "random-seed1" / "metrics.jsonl").read_text()

    # The stopped wave goes on, whatever joins it and whatever memory there is.
    config = tiny_config(**MIXED | {"num_rounds": 4, "run.memory_limit_gb": 6.0})
    begun = lambda: rows_in(runs / "load_balanced_running-seed3") >= 2
    first, whole = compare(config, tmp_path, stop=begun, profile=False)
    assert not whole and (runs / "random-seed1" / "summary.json").exists()
    assert (runs / "random-seed1" / "metrics.jsonl").read_text().startswith(before)

    found, whole = compare(tiny_config(**MIXED), tmp_path, stop=never, profile=False)
    assert whole and len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert [folder.name for folder in found] == list(mixed)
    for folder in found:
        assert_same_results(folder, mixed[folder.name])
    run = fedmoe_jax.load_run(runs / "random-seed1")  # of a wave that no cut gives
    assert run.state is not None and run.state.round == 6


@pytest.mark.slow
def test_what_runs_freeze_is_their_own_bitwise(users_flags, tmp_path):
    config = tiny_config(**STAGED)
    folders, whole = compare(config, tmp_path / "runs", stop=never, profile=False)
    members = list_members(config)
    assert whole and len(list((tmp_path / "runs" / "checkpoints").iterdir())) == 1
    assert len(members) == len(folders) == 2
    for member, folder in zip(members, folders, strict=True):
        alone = tmp_path / "alone" / member.name
        assert run_alone(member.config, alone)
        assert_same_results(folder, alone)


@pytest.mark.slow
def test_a_finished_comparison_is_not_planned_again(tmp_path, monkeypatch):
    compare(tiny_config(), tmp_path, stop=never, profile=False)
    before = snapshot(tmp_path)

    def refuse(*_):
        raise AssertionError("nothing is left to plan")

    monkeypatch.setattr(plan, "plan_run", refuse)
    monkeypatch.setattr("fedmoe_jax.train.compare.load_data", refuse)
    folders, whole = compare(tiny_config(), tmp_path, stop=never, profile=False)
    assert whole and len(folders) == 1 and snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_wave_goes_on_with_runs_that_are_not_asked_for(tmp_path):
    """Its checkpoints hold all of them: none starts again, and none is lost."""
    two, one = (tiny_config(**{"compare.seeds": seeds}) for seeds in ((0, 1), (1,)))
    assert compare(two, tmp_path, stop=never, profile=False)[1]
    one.num_rounds = 6
    folders, whole = compare(one, tmp_path, stop=never, profile=False)
    assert whole and [folder.name for folder in folders] == ["load_balanced-seed1"]
    assert rows_in(tmp_path / "runs" / "load_balanced-seed0") == 6
    (wave,) = (tmp_path / "checkpoints").iterdir()
    members = json.loads((wave / "members.json").read_text())["members"]
    assert members == ["load_balanced-seed0", "load_balanced-seed1"]

    # A run whose folder was removed starts again alone; its old wave is set aside.
    shutil.rmtree(tmp_path / "runs" / "load_balanced-seed1")
    assert compare(one, tmp_path, stop=never, profile=False)[1]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert len(names) == 2 and f"{wave.name}.superseded" in names


@pytest.mark.slow
def test_waves_of_older_versions_go_on_too(tmp_path):
    """They are not recorded: the config of then says what they were."""
    config = tiny_config()
    (folder,), _ = compare(config, tmp_path, stop=never, profile=False)
    rows = (folder / "metrics.jsonl").read_text()
    (recorded,) = tmp_path.glob("checkpoints/*/members.json")
    recorded.unlink()
    assert fedmoe_jax.load_run(folder).state.round == 4
    more = tiny_config(**{"compare.seeds": (1, 0)}, num_rounds=6)
    assert compare(more, tmp_path, stop=never, profile=False)[1]
    assert (folder / "metrics.jsonl").read_text().startswith(rows)
    assert rows_in(folder) == 6 and recorded.is_file()


def test_a_part_without_a_run_says_so(tmp_path, capsys):
    config, workdir = tiny_config(), tmp_path / "new"
    part = compare(config, workdir, stop=never, profile=False, part=(7, 8))
    assert part == ([], True) and not workdir.exists()
    assert capsys.readouterr().out == (
        "--only=7/8 has no run, as the comparison has 1\n"
    )


@pytest.mark.parametrize(
    ("changes", "settings", "field", "refused"),
    [
        (("fitness.rate=0.2", "fitness.rate=0.4"), (), "fitness.rate", True),
        (("", "fitness.rate=0.4"), (), "fitness.rate", False),
        (("greedy: fitness.rate=0.4", ""), (), "fitness.rate", False),
        (("",), ("greedy: local_steps=3", "random: local_steps=2"), "local_steps", 1),
        (("",), ("greedy: local_steps=3",), "local_steps", False),
    ],
)
def test_check_given_refuses_a_field_that_every_run_changes(
    changes, settings, field, refused
):
    lists = dict(changes=changes, settings=settings, strategies=("greedy", "random"))
    config = tiny_config(**{f"compare.{name}": each for name, each in lists.items()})
    if not refused:
        check_given(config, [field, "num_rounds"])
        return
    with pytest.raises(UserError, match=f"--config.{field} changes no run, .*allowed:"):
        check_given(config, ["num_rounds", field])


def test_check_given_lets_a_single_run_have_any_field():
    check_given(default.get_config(), ["fitness.rate"])
