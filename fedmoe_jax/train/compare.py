"""A comparison is a sweep over strategies x changes x seeds."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from fedmoe_jax.config import validate
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.train.plan import Member, load_data, plan_waves
from fedmoe_jax.train.sweep import sweep
from fedmoe_jax.train.workdir import own_workdir


def apply_change(config: ConfigDict, change: str) -> None:
    """Applies `field=value` in place, with the type that the field has.

    Raises:
      UserError: no such field, or a value of another type.
    """
    name, _, text = change.partition("=")
    known = flatten(config.to_dict())
    if name not in known or name in ("strategy", "seed") or not text:
        raise UserError(
            f"compare.changes has {change!r}; allowed: field=value with a config field "
            "other than strategy and seed"
        )
    kind = type(known[name])
    try:
        if kind not in (int, float, str):
            raise TypeError
        config.update_from_flattened_dict({name: kind(text)})
    except (TypeError, ValueError):
        raise UserError(
            f"compare.changes has {change!r}; allowed: a number or name of the type of "
            f"{name}={known[name]!r}"
        ) from None


def make_member(
    config: ConfigDict, strategy: str, change: str, seed: int
) -> ConfigDict:
    """The config of one run; it shares nothing with `config` or other members.

    Raises:
      UserError: it is not allowed.
    """
    if not isinstance(strategy, str) or type(seed) is not int:
        raise UserError(
            f"compare.strategies and compare.seeds have {strategy!r} and {seed!r}; "
            "allowed: names and whole numbers"
        )
    fields = config.to_dict() | {"strategy": strategy, "seed": seed}
    del fields["compare"]
    member = ConfigDict(fields)
    for part in filter(None, change.split(",")):
        apply_change(member, part)
    validate(member)
    return member


def list_members(config: ConfigDict) -> list[Member]:
    """Every run of a comparison, seeds innermost so that programs are shared.

    Args:
      config: with `compare.strategies`, `compare.changes` (`field=value`, several
        joined by commas; `""` changes nothing) and `compare.seeds`.

    Raises:
      UserError: a member's config is not allowed, or a name occurs twice.
    """
    members = []
    for change in config.compare.changes:
        for strategy in config.compare.strategies:
            for seed in config.compare.seeds:
                member = make_member(config, strategy, change, seed)
                suffix = f"-{change}" if change else ""
                members.append(Member(f"{strategy}{suffix}-seed{seed}", member))
    names = [member.name for member in members]
    if not names or len(set(names)) < len(names):
        raise UserError(
            "compare.strategies, compare.changes and compare.seeds must name at least "
            f"one run and none twice; they name {len(names)}"
        )
    return members


def compare(
    config: ConfigDict, workdir: Path, *, stop: Callable[[], bool], profile: bool
) -> tuple[list[Path], bool]:
    """Runs or resumes all members, those that can share a program together.

    Returns:
      The folders of the finished members, and whether all are finished.

    Raises:
      UserError: as `train`, before anything is written where the config is at fault.
    """
    members = multihost.run_on_all(list_members, config)
    for member in members:
        multihost.on_leader(
            load_data, member.config
        )  # alone, it may have to be prepared
    waves = multihost.run_on_all(plan_waves, members)
    with contextlib.ExitStack() as owned:
        own = lambda: owned.enter_context(own_workdir(workdir, config))
        multihost.on_leader(own)
        return sweep(members, workdir, waves, stop=stop, profile=profile)
