"""Fields that a run does not use neither change it nor block its resume."""

import json

import pytest
from factories import (
    SMALL,
    assert_same_results,
    never,
    rows_of,
    run_alone,
    stop_at,
    tiny_study,
)
from ml_collections import ConfigDict

from fedmoe_jax import load_run
from fedmoe_jax.config import list_idle_fields, list_options, validate
from fedmoe_jax.configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.privacy.defences import DEFENCES
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.train.compare import compare
from fedmoe_jax.train.workdir import check_same_run

# By which processes are off; another value would turn one on.
SWITCHES = {
    "availability.capacity_bias",
    "availability.dropout",
    "availability.share",
    "availability.swing",
    "background.most",
    "bandwidth.spread",
    "channel.kind",
    "drift.images",
    "drift.labels",
    "expert_links.kind",
    "groups.kind",
    "pressure.share",
    *(f"privacy.{name}" for name in (*DEFENCES, "noise", "observe")),
}


def small_config(**changes):
    config = default.get_config("smoke")
    config.update_from_flattened_dict(SMALL | {"run.tensorboard": False} | changes)
    return config


def idle_fields(config):
    return set().union(*list_idle_fields(config))


def change_idle_fields(config):
    """A config in which every idle field has another value, but for the switches."""
    changed = ConfigDict(config.to_dict())
    for name in sorted(idle_fields(config) - SWITCHES):
        value = flatten(config.to_dict())[name]
        allowed = list_options()[name].allowed
        options = [value + 1, value / 2, value + 0.125, value - 0.125]
        other = next(
            o for o in map(type(value), options) if o in allowed and o != value
        )
        changed.update_from_flattened_dict({name: other})
    validate(changed)
    return changed


def test_fields_are_idle_by_strategy_and_process():
    strategies, processes = list_idle_fields(small_config(strategy="fedmoe"))
    assert "fedmix.threshold" in strategies and "fedmoe.period" not in strategies
    assert SWITCHES < processes and "late.discount" in processes
    # Read where their processes are off, too.
    assert not processes & {"late.kind", "availability.sampling"}
    on = small_config(**{"pressure.share": 0.5, "drift.labels": 0.5})
    gone = processes - list_idle_fields(on)[1]
    assert gone >= {"pressure.share", "pressure.left", "drift.labels", "drift.start"}
    assert not gone & {"drift.images", "drift.strength", "channel.kind"}
    grouped = {"groups.kind": "inversion", "groups.count": 2}
    gone = processes - list_idle_fields(small_config(**grouped))[1]
    assert gone == {"groups.kind", "groups.count", "groups.skew"}
    study = tiny_study(("fedmoe", "random"))
    assert list_idle_fields(study)[0] == strategies


@pytest.mark.slow
def test_idle_fields_change_nothing_bitwise(tmp_path):
    config = small_config()
    changed = change_idle_fields(config)
    differ = {
        n
        for n, v in flatten(changed.to_dict()).items()
        if v != flatten(config.to_dict())[n]
    }
    assert differ == idle_fields(config) - SWITCHES and len(differ) > 30
    assert run_alone(config, tmp_path / "one")
    assert run_alone(changed, tmp_path / "other")
    assert_same_results(tmp_path / "one", tmp_path / "other")


def make_older(folder):
    """Deletes half of the idle groups from a folder's config and changes the rest."""
    path = folder / "config.json"
    (folder / "sha256.json").unlink(missing_ok=True)
    config = json.loads(path.read_text())
    for group in ("fedmoe", "fedjets", "channel", "groups", "pressure"):
        del config[group]
    config["evaluation"].pop("targets")
    config["fedmix"]["threshold"], config["bandwidth"]["persistence"] = 0.7, 0.1
    path.write_text(json.dumps(config))


@pytest.mark.slow
def test_a_run_resumes_whatever_its_idle_fields_were(tmp_path):
    config, older = small_config(), tmp_path / "older"
    assert run_alone(config, tmp_path / "whole")
    assert not run_alone(config, older, stop_at(older, 2))
    make_older(older)
    assert load_run(older).state.round == 2
    assert run_alone(config, older)
    assert_same_results(older, tmp_path / "whole")
    make_older(older)
    assert run_alone(config, older)  # finished
    assert load_run(older).config.fedmoe == default.get_config().fedmoe


@pytest.mark.slow
def test_a_comparison_resumes_whatever_its_idle_fields_were(tmp_path):
    config = tiny_study(("random",), seeds=(0,))
    (folder,), _ = compare(config, tmp_path, stop=never, profile=False)
    before = rows_of(folder)
    for path in (tmp_path, folder):
        make_older(path)
    grown = tiny_study(("random", "greedy"), seeds=(0,))
    found, whole = compare(grown, tmp_path, stop=never, profile=False)
    assert whole and len(found) == 2 and rows_of(folder) == before
    assert load_run(found[1]).state is not None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fedmix.threshold": 0.5, "strategy": "fedmix"}, "fedmix.threshold: 0.05 ->"),
        ({"pressure.share": 0.5}, "pressure.share: 0.0 -> 0.5"),
        ({"late.kind": "drop"}, "late.kind: wait -> drop"),
        ({"groups.kind": "permuted"}, "groups.kind: none -> permuted"),
        ({"availability.sampling": "size"}, "availability.sampling: uniform -> size"),
        ({"fitness.rate": 0.5}, "fitness.rate: 0.3 -> 0.5"),
    ],
)
def test_fields_in_use_stay_as_they_were(changes, told):
    strategy = changes.get("strategy", "load_balanced")
    saved = small_config(strategy=strategy).to_dict()
    with pytest.raises(UserError, match=f"{told}.*allowed: the old values"):
        check_same_run(saved, small_config(**changes))


def test_a_field_in_use_that_the_folder_lacks_is_refused():
    config = small_config(strategy="fedmix", **{"pressure.share": 0.5})
    for group, name in (("fedmix", "fedmix.sparsity"), ("pressure", "pressure.left")):
        saved = config.to_dict()
        del saved[group]
        with pytest.raises(UserError, match=f"had no field {name}; allowed: that vers"):
            check_same_run(saved, config)
