"""A comparison is a sweep over strategies x changes x seeds."""

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fedmoe_jax.config import fill_defaults, list_options, validate
from fedmoe_jax.fields import LISTS, OPTIONAL_LISTS
from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import flatten, plain
from fedmoe_jax.runtime.names import caseless_name
from fedmoe_jax.train.parts import WHOLE, Part, name_part, take_part
from fedmoe_jax.train.plan import Member, load_data, plan_waves
from fedmoe_jax.train.sweep import name_wave, sweep
from fedmoe_jax.train.waves import list_unrecorded
from fedmoe_jax.train.work import find_work
from fedmoe_jax.train.workdir import own_workdir, read_config


def split_change(change: str) -> list[str]:
    """The single changes of several; commas separate them before `field=` alone.

    `devices.csv=a,b.csv` is one change.
    """
    fields = "|".join(map(re.escape, list_options()))
    return [part for part in re.split(rf",(?=(?:{fields})=|$)", change) if part]


def split_strategy(change: str) -> tuple[str, str]:
    """`STRATEGY: field=value` in its parts; the first is empty where none is named."""
    name, colon, own = change.partition(":")
    return (name.strip(), own.strip()) if colon and "=" not in name else ("", change)


def read_settings(lists: ConfigDict) -> dict[str, str]:
    """What every run of a strategy changes beside the comparison's changes.

    Raises:
      UserError: no strategy of the comparison is named, or one twice.
    """
    found: dict[str, str] = {}
    for text in lists.get("settings", ()):
        strategy, change = split_strategy(text)
        if strategy not in lists.strategies or strategy in found:
            raise UserError(
                f"compare.settings has {show(text)}; allowed: STRATEGY: field=value, "
                f"each once, with one of {', '.join(lists.strategies)}"
            )
        found[strategy] = change
    return found


def apply_change(config: ConfigDict, change: str) -> None:
    """Applies `field=value` in place, with the type that the field has.

    Raises:
      UserError: no such field, or a value of another type.
    """
    name, _, text = change.partition("=")
    known = flatten(config.to_dict())
    if name not in known and text:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f", and {near[0]} is" if near else ""
        raise UserError(
            f"compare.changes has {show(change)}; allowed: field=value with a config "
            f"field, which {name} is not{hint}"
        )
    if name in ("strategy", "seed") or not text:
        raise UserError(
            f"compare.changes has {show(change)}; allowed: field=value with a config "
            "field other than strategy and seed"
        )
    kind = type(known[name])
    if kind not in (int, float, str):
        raise UserError(
            f"compare.changes has {show(change)}; allowed: fields with a number or a "
            f"name, which {name}={known[name]!r} has not"
        )
    try:
        config.update_from_flattened_dict({name: kind(text)})
    except ValueError:
        raise UserError(
            f"compare.changes has {show(change)}; allowed: a number or name of the "
            f"type of {name}={known[name]!r}"
        ) from None


def make_member(
    config: ConfigDict, strategy: str, change: str, seed: int
) -> ConfigDict:
    """The config of one run; it shares nothing with `config` or other members.

    Raises:
      UserError: it is not allowed.
    """
    fields = config.to_dict() | {"strategy": strategy, "seed": seed}
    for group in ("compare", "tune"):
        fields.pop(group, None)
    member = ConfigDict(fields)
    for part in split_change(change):
        apply_change(member, part)
    validate(member)
    return member


def check_lists(lists: Any) -> None:
    """Raises UserError unless the lists of a comparison are tuples of what is due."""
    fields = set(lists.keys() if isinstance(lists, ConfigDict) else ())
    for name in sorted((fields | {*OPTIONAL_LISTS}) ^ LISTS.keys()):
        fault = "is missing" if name in LISTS else "is unknown"
        raise UserError(f"compare.{name} {fault}; allowed: {', '.join(LISTS)}")
    for name, (fits, allowed) in LISTS.items():
        optional = name in OPTIONAL_LISTS
        values = lists.get(name, ()) if optional else lists[name]
        listed = isinstance(values, tuple | list) and all(map(fits, values))
        empty = not values and not optional
        if not listed or empty or len(set(values)) < len(values):
            least = "" if optional else "at least one and "
            raise UserError(
                f"compare.{name}={show(values)} is not allowed; allowed: {allowed}, "
                f"{least}none twice"
            )


def check_distinct(members: Iterable[Member]) -> None:
    """Raises UserError where two members are the same run, by whatever change."""
    known: dict[str, str] = {}
    for name, config in members:
        fields = json.dumps(plain(config.to_dict()), sort_keys=True)
        if fields in known:
            raise UserError(
                f"compare.changes make {known[fields]} and {name}, which are the same "
                "run; allowed: none twice"
            )
        known[fields] = name


def list_pairs(lists: ConfigDict) -> list[tuple[str, str]]:
    """Every change with every strategy that it is for, which it does not name.

    Raises:
      UserError: a change names a strategy that is not compared.
    """
    pairs = []
    for change in lists.changes:
        own, fields = split_strategy(change)
        if own and own not in lists.strategies:
            raise UserError(
                f"compare.changes has {show(change)}; allowed: changes of all, or of "
                f"one of {', '.join(lists.strategies)}"
            )
        chosen = [own] if own else lists.strategies
        pairs += [(fields, strategy) for strategy in chosen]
    return pairs


def join_changes(*changes: str | None) -> str:
    """Changes of a run as one, the later ones in force."""
    return ",".join(filter(None, changes))


def check_given(config: ConfigDict, given: Iterable[str]) -> None:
    """Checks that fields of the command line have a say in a comparison.

    Args:
      config: with a group `compare`, or of one run.
      given: config fields.

    Raises:
      UserError: every run changes one of them; also as `list_members`.
    """
    if "compare" not in config:
        return
    check_lists(config.compare)
    settings, changed = read_settings(config.compare), []
    for change, strategy in list_pairs(config.compare):
        both = join_changes(settings.get(strategy), change)
        changed.append({part.partition("=")[0] for part in split_change(both)})
    for field in given:
        if all(field in fields for fields in changed):
            raise UserError(
                f"--config.{field} changes no run, as compare.changes or --settings "
                "set it in all; allowed: its value there, or these without it"
            )


def list_members(config: ConfigDict) -> list[Member]:
    """Every run of a comparison, seeds innermost so that programs are shared.

    A name has the strategy, the change and the seed, see `caseless_name`; the config
    has all of a change that is no safe name.

    Args:
      config: with `compare.strategies`, `compare.changes` (`field=value`, several
        joined by commas; `""` changes nothing; `STRATEGY: field=value` is a change of
        this one alone) and `compare.seeds`; `compare.settings` are changes that all
        runs of a strategy have, its own rates say, and no name shows.

    Raises:
      UserError: lists of other types, a member's config that is not allowed, or a run
        that occurs twice.
    """
    check_lists(config.compare)
    members = []
    settings = read_settings(config.compare)
    for change, strategy in list_pairs(config.compare):
        name = caseless_name(f"{strategy}-{change}" if change else strategy)
        both = join_changes(settings.get(strategy), change)
        seeds = [int(seed) for seed in config.compare.seeds]
        first = make_member(config, strategy, both, seeds[0])
        fields = first.to_dict()  # what is allowed with one seed is with any
        others = [ConfigDict(fields | {"seed": seed}) for seed in seeds[1:]]
        members += [
            Member(f"{name}-seed{seed}", member)
            for seed, member in zip(seeds, (first, *others), strict=True)
        ]
    check_distinct(members)
    return members


def find_older(workdir: Path) -> dict[Path, list[str]]:
    """Members of the waves of a version that did not record them, by folder.

    They are those that the comparison's config gave then.

    Args:
      workdir: of a comparison, or none.

    Raises:
      UserError: that config is not allowed.
    """
    unknown = set(list_unrecorded(workdir / "checkpoints"))
    if not unknown or not (workdir / "config.json").is_file():
        return {}
    then = list_members(fill_defaults(read_config(workdir / "config.json")))
    named = {name_wave(wave): wave.names for wave in plan_waves(then)}
    folders = {workdir / "checkpoints" / name: names for name, names in named.items()}
    return {folder: names for folder, names in folders.items() if folder in unknown}


def compare(
    config: ConfigDict,
    workdir: Path,
    *,
    stop: Callable[[], bool],
    profile: bool,
    part: Part = WHOLE,
) -> tuple[list[Path], bool]:
    """Runs or resumes all members, those that can share a program together.

    What is finished is neither planned nor touched, so that a comparison may grow.

    Args:
      config: with a group `compare`, see `list_members`.
      workdir: a folder with runs of this comparison, or none.
      stop: see `sweep`.
      profile: see `sweep`.
      part: of the members, see `take_part`; other parts may share the folder.

    Returns:
      The folders of the finished members of this part, and whether all are finished.

    Raises:
      UserError: as `train`, before anything is written where the config is at fault.
    """
    members = multihost.run_on_all(list_members, config)
    mine = multihost.run_on_all(take_part, members, part)
    if not mine:
        print(f"{name_part(part)} has no run, as the comparison has {len(members)}")
        return [], True
    work = find_work(workdir, members, mine, find_older)
    for member in work.members:
        multihost.on_leader(
            load_data, member.config
        )  # alone, it may have to be prepared
    waves = multihost.run_on_all(plan_waves, work.members, work.begun)
    with contextlib.ExitStack() as owned:
        shared = part != WHOLE
        own = lambda: owned.enter_context(own_workdir(workdir, config, shared=shared))
        multihost.on_leader(own)
        return sweep(work.mine, workdir, waves, stop=stop, profile=profile)
