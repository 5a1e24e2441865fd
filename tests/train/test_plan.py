"""Plans of runs, and which of them advance together as waves."""

import re

import chex
import numpy as np
import pytest
from factories import (
    make_config,
    make_data,
    make_options,
    never,
    plan_run,
    tiny_study,
)

from fedmoe_jax import program
from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.federation import make_partition
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.sharding import CLIENTS, RUNS, build_mesh
from fedmoe_jax.train.compare import compare, list_members
from fedmoe_jax.train.plan import (
    _load,
    choose_devices,
    estimate,
    fit_chunk,
    load_copies_once,
    load_data,
    load_dataset_once,
    make_partition_once,
    make_wave,
    note_room,
    plan_waves,
    program_key,
)
from fedmoe_jax.train.plan import plan_run as plan_one
from fedmoe_jax.train.sweep import name_wave
from fedmoe_jax.types import PER_RUN, Federation


@pytest.mark.parametrize("name", ["greedy", "local"])
def test_devices_without_room_for_an_expert_are_noted(name):
    huge = {"strategy": name, "devices.model_scale": 1e9, "devices.deadline": 60.0}
    told = "greedy: no client has room .*model_scale=1e\\+09, devices.deadline=60\\)"
    notes = note_room(plan_run(**huge))
    if name == "local":  # needs no server's room
        assert notes == []
    else:
        assert len(notes) == 1 and re.fullmatch(told, notes[0])
    assert note_room(plan_run(**huge | {"devices.model_scale": 1.0})) == []


@pytest.mark.parametrize(
    ("platform", "asked", "chunk"),
    [("cpu", 0, 1), ("gpu", 0, 5), ("gpu", 2, 2), ("cpu", 3, 3)],
)
def test_clients_at_once_are_one_on_a_cpu_and_all_elsewhere(
    platform, asked, chunk, monkeypatch
):
    monkeypatch.setattr(program, "find_platform", lambda mesh: platform)
    fields = {"run.client_chunk": asked, "num_clients": 6, "cohort_size": 5}
    for devices in (1, 5):  # runs of a wave may share them otherwise
        plan = plan_run(**fields | {"run.num_devices": devices})
        assert plan.program.static.run.client_chunk == chunk


def test_as_many_clients_at_once_as_memory_allows(monkeypatch):
    monkeypatch.setattr(program, "find_platform", lambda mesh: "gpu")
    fields = {"num_clients": 6, "cohort_size": 5, "batch_size": 500}
    least = {}
    for chunk in (1, 2, 3, 5):
        plan = plan_run(**fields, **{"run.client_chunk": chunk})
        least[chunk] = sum(estimate([plan], plan.program).values()) / 1e9
    assert least[1] < least[2] < least[3] < least[5]
    limits = {least[5]: 5, least[3]: 3, least[2] / 2: 1}
    for limit, chunk in limits.items():
        plan = plan_run(**fields, **{"run.memory_limit_gb": limit})
        wave = fit_chunk(make_wave([("alone", plan)]))
        assert wave.program.static.run.client_chunk == chunk


@pytest.mark.slow
def test_runs_come_before_clients_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(program, "find_platform", lambda mesh: "gpu")
    fields = {"num_clients": 6, "cohort_size": 5, "batch_size": 500}

    def plan_two(**changes):
        study = tiny_study(("greedy",), seeds=(0, 1), **fields, **changes)
        return plan_waves(list_members(study))

    (pair,) = plan_two(**{"run.client_chunk": 1})
    least = sum(estimate(pair.plans, pair.program).values()) / 1e9
    (fitted,) = plan_two(**{"run.memory_limit_gb": least * 1.001})
    assert len(fitted.names) == 2
    assert fitted.program.static.run.client_chunk == 1
    assert len(plan_two(**{"run.memory_limit_gb": least * 0.999})) == 2


def test_load_data_has_it_at_hand_for_every_later_run():
    config = make_config(**{"data.name": "synthetic"})
    load_data(config)
    before = _load.cache_info().misses
    config.data.public = 3
    assert load_dataset_once(config.data).task == "images"
    assert _load.cache_info().misses == before
    with pytest.raises(UserError, match="cohort_size=21"):
        load_data(make_config(cohort_size=21))


def test_load_dataset_once_takes_the_loader_of_a_plugin_that_has_joined_anew(
    monkeypatch,
):
    for count in (4, 5):
        mine = make_data(count)
        monkeypatch.setitem(DATASETS, "mine", lambda options, mine=mine: mine)
        options = make_options(name="mine")
        assert load_dataset_once(options) is load_dataset_once(options) is mine


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({"cohort_size": 3}, 3),  # of eight, as many as have a client
        ({"cohort_size": 10}, 8),
        ({"cohort_size": 10, "run.num_devices": 2}, 2),
        ({"cohort_size": 10, "strategy": "centralised"}, 1),  # one owner of all data
    ],
)
def test_choose_devices_by_hand(fields, devices):
    assert choose_devices(make_config(**fields)) == devices


@pytest.fixture(scope="module")
def plans():
    """Plans of a tiny config, by what is changed of it."""
    changes = {
        "plain": {},
        "seed": {"seed": 5, "fitness.rate": 0.9},
        "greedy": {"strategy": "greedy"},
        "fedavg": {"strategy": "fedavg"},
        "steps": {"local_steps": 3},
        "rounds": {"num_rounds": 80},
        "bias": {"gate.bias": 1.0},
        "more bias": {"gate.bias": 2.0, "strategy": "greedy"},
        "fedavg, bias": {"gate.bias": 2.0, "strategy": "fedavg"},
    }
    return {name: plan_run(**change) for name, change in changes.items()}


@pytest.mark.slow
def test_program_key_is_that_of_what_can_run_together(plans):
    keys = {name: program_key(plan) for name, plan in plans.items()}
    assert keys["plain"] == keys["seed"] == keys["greedy"]
    assert keys["bias"] == keys["more bias"]
    assert keys["fedavg"] == keys["fedavg, bias"]  # with one expert there is none
    assert len(set(keys.values())) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "devices", "shape"),
    [
        (6, 4, (2, 2)),  # two devices share the clients of a run
        (3, 4, (1, 4)),  # as of a run alone
        (4, 8, (4, 2)),
        (15, 8, (1, 8)),  # these three as in docs/running.md
        (16, 8, (8, 1)),
        (12, 8, (4, 2)),
        (1, 2, (1, 2)),
    ],
)
def test_make_wave_divides_devices_among_runs_by_hand(plans, runs, devices, shape):
    config = plans["plain"].config.copy_and_resolve_references()
    config.run.num_devices = devices
    program = plans["plain"].program._replace(mesh=build_mesh(devices))
    plan = plans["plain"]._replace(config=config, program=program)
    wave = make_wave([(str(number), plan) for number in range(runs)])
    found = wave.program.mesh.shape
    assert (found[RUNS], found[CLIENTS]) == shape
    assert wave.names == [str(number) for number in range(runs)]


@pytest.mark.slow
def test_make_wave_numbers_the_strategies_of_its_runs(plans):
    names = "greedy", "plain", "seed", "greedy"
    wave = make_wave([(name, plans[name]) for name in names])
    assert [int(plan.hyper.strategy) for plan in wave.plans] == [0, 1, 1, 0]
    assert plans["greedy"].hyper.strategy == 0
    rates = [float(plan.hyper.fitness.rate) for plan in wave.plans]
    assert rates[2] == np.float32(0.9) != rates[1]


@pytest.mark.slow
def test_runs_that_divide_alike_share_a_partition():
    """Strategies share it, seeds and kinds of partition do not."""
    config = tiny_study(("random", "greedy"), ("", "partition.kind=iid"))
    members = list_members(config)
    waves = plan_waves(members)
    plans = [plan for wave in waves for plan in wave.plans]
    assert len(plans) == 8 and len({id(plan.partition) for plan in plans}) == 4
    alone = {
        name: plan_one(member, build_mesh(1)).partition for name, member in members
    }
    names = [name for wave in waves for name in wave.names]
    for name, plan in zip(names, plans, strict=True):
        chex.assert_trees_all_equal(plan.partition, alone[name])


@pytest.mark.slow
def test_plan_waves_gives_what_is_static_a_program_of_its_own():
    config = tiny_study(
        ("random", "fedavg", "greedy"), ("", "loss.z=0.1", "gate.mode=personal")
    )
    waves = plan_waves(list_members(config))
    assert [wave.names for wave in waves] == [
        [
            *("random-seed0", "random-seed1", "greedy-seed0", "greedy-seed1"),
            *(f"{s}-loss.z=0.1-seed{i}" for s in ("random", "greedy") for i in "01"),
        ],
        ["fedavg-seed0", "fedavg-seed1"] + [f"fedavg-loss.z=0.1-seed{i}" for i in "01"],
        [f"{s}-gate.mode=personal-seed{i}" for s in ("random", "greedy") for i in "01"],
        [f"fedavg-gate.mode=personal-seed{i}" for i in "01"],
    ]
    assert len({name_wave(wave) for wave in waves}) == 4


@pytest.mark.slow
def test_cut_makes_waves_that_fit_into_the_memory(tmp_path):
    config = tiny_study(("random", "greedy"), seeds=(0, 1, 2))
    members = list_members(config)
    (wave,) = plan_waves(members)
    needed = [
        sum(estimate(wave.plans[:count], wave.program).values()) / 1e9
        for count in (1, 2, 3, 6)
    ]
    assert needed == sorted(needed)
    for limit, expected in [
        (needed[3], [6]),
        (needed[2], [3, 3]),
        (needed[0], [1] * 6),
    ]:
        for member in members:
            member.config.run.memory_limit_gb = limit * 1.0001
        assert [len(wave.names) for wave in plan_waves(members)] == expected
    for member in members:
        member.config.run.memory_limit_gb = needed[0] * 0.99
    with pytest.raises(UserError, match="run.memory_limit_gb"):
        plan_waves(members)
    config.run.memory_limit_gb = needed[2] * 1.0001
    folders, whole = compare(config, tmp_path, stop=never, profile=False)
    assert whole and len(folders) == 6
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_the_partitions_of_all_runs_are_within_the_limit_together():
    config, data = make_config(**{"partition.min_size": 1}), make_data(64)
    made = {}
    alone = sum(array.nbytes for array in make_partition(config, data)) / 1e9
    config.run.memory_limit_gb = 1.5 * alone
    make_partition_once(config, data, made)
    assert make_partition_once(config, data, made) is made.popitem()[1]
    make_partition_once(config, data, made)
    config.seed = 1
    with pytest.raises(UserError, match="beside the .* of other runs; allowed"):
        make_partition_once(config, data, made)


@pytest.mark.slow
def test_plan_waves_joins_runs_that_differ_in_their_own_fields_only():
    """A field that differs and is not in `PER_RUN` would come from the first run."""
    config = tiny_study(("random",), ("", "partition.alpha=5"))
    (wave,) = plan_waves(list_members(config))
    first, *others = [plan.federation for plan in wave.plans]
    assert len(others) == 3
    for name in set(Federation.__dataclass_fields__) - set(PER_RUN):
        for other in others:
            chex.assert_trees_all_equal(getattr(first, name), getattr(other, name))
    for other in others:
        assert not np.array_equal(first.label_mix, other.label_mix)


def test_runs_share_the_copies_of_their_groups():
    """Over seeds and skews; other groups are other data, and none are the data."""
    fields = {"groups.kind": "rotation", "groups.count": 3, "data.name": "synthetic"}
    config = make_config(**fields)
    data = load_copies_once(config)
    assert len(data.group_names) == 3
    config.seed, config.groups.skew, config.data.public = 1, 2.0, 5
    assert load_copies_once(config) is data
    config.groups.count = 2
    assert len(load_copies_once(config).group_names) == 2
    config.groups.kind = "none"
    assert load_copies_once(config) is load_dataset_once(config.data)
    kinds = {"groups.count": 2, "data.name": "synthetic", "run.memory_limit_gb": 1e-3}
    with pytest.raises(UserError, match="run.memory_limit_gb=0.001 is too low: the d"):
        load_copies_once(make_config(**{"groups.kind": "permuted"} | kinds))
    with pytest.raises(UserError, match="data.name='markov'.* allowed: none"):
        load_data(make_config(**{"groups.kind": "permuted", "data.name": "markov"}))


def test_plan_run_adds_the_notes_on_the_data_to_its_refusal(monkeypatch):
    data = make_data()._replace(owner=np.arange(10) % 2, notes=("first", "second"))
    monkeypatch.setitem(DATASETS, "noted", lambda options: data)
    fields = {"data.name": "noted", "partition.kind": "natural", "data.public": 0}
    with pytest.raises(UserError) as error:
        plan_run(**fields, **{"num_clients": 4, "partition.min_size": 1})
    assert str(error.value) == (
        "num_clients=4 is not allowed with partition.kind='natural'; allowed: at most "
        "2, the data's clients (first) (second)"
    )


def test_runs_of_different_groups_are_different_waves():
    study = tiny_study(("oracle",), seeds=(0, 1), **{"groups.count": 2})
    members = list_members(study)
    for (_, config), kind in zip(members, ("rotation", "permuted"), strict=True):
        config.groups.kind = kind
    first, second = plan_waves(members)
    assert first.plans[0].program == second.plans[0].program
    assert first.plans[0].data is not second.plans[0].data
    members[0].config.groups.kind = "permuted"
    (wave,) = plan_waves(members)
    one, other = (plan.federation for plan in wave.plans)
    assert one.train is other.train and (one.index != other.index).any()
