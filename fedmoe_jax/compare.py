"""Several runs side by side: strategies x changes x seeds, a folder for each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from fedmoe_jax.config import flatten, validate
from fedmoe_jax.files import read_json
from fedmoe_jax.train import build_parts, check_same_run, claim_workdir, train
from fedmoe_jax.types import UserError


class Member(NamedTuple):
    """One run of a comparison: its folder's name and its config."""

    name: str
    config: ConfigDict


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
    config: ConfigDict, workdir: Path, *, stop: Callable[[], bool]
) -> tuple[list[Path], bool]:
    """Runs or resumes every member in turn.

    Returns:
      The folders of the finished members, and whether all are finished.

    Raises:
      UserError: as `train`, before anything is written where the config is at fault.
    """
    members = list_members(config)
    if not (workdir / "config.json").exists():
        for member in members:
            if member.config.seed == members[0].config.seed:
                build_parts(member.config)  # refuses what data or machine do not allow
    claim_workdir(workdir, config)
    finished = []
    for number, member in enumerate(members, start=1):
        folder = workdir / "runs" / member.name
        label = f"[{number}/{len(members)}] {member.name}"
        if not is_finished(folder, member.config):
            print(label, flush=True)
            if not train(member.config, folder, stop=stop, label=member.name):
                return finished, False
        finished.append(folder)
        if stop() and number < len(members):
            return finished, False
    return finished, True


def is_finished(folder: Path, config: ConfigDict) -> bool:
    """Whether a member's folder holds the whole run that `config` describes.

    Raises:
      UserError: it holds another run.
    """
    if not (folder / "summary.json").exists():
        return False
    check_same_run(read_json(folder / "config.json"), config)
    return read_json(folder / "summary.json")["num_rounds"] >= config.num_rounds
