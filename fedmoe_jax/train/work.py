"""Work that is left of a comparison: its unfinished runs, and waves that go on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fedmoe_jax.config import fill_defaults, list_free_fields, to_tuples
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.runtime.seals import METRICS
from fedmoe_jax.train.plan import Member
from fedmoe_jax.train.sweep import name_folder
from fedmoe_jax.train.waves import read_waves
from fedmoe_jax.train.workdir import is_finished, read_config


class Work(NamedTuple):
    """What a call has to do.

    Attributes:
      members: the runs to plan: those that are left, and all of a wave that goes on.
      begun: names of the members of every wave that goes on.
      mine: the runs that the call has to see finished.
    """

    members: list[Member]
    begun: list[list[str]]
    mine: list[Member]


# Members of the waves of a version that did not record them, by folder.
FindOlder = Callable[[Path], dict[Path, list[str]]]


def find_work(
    workdir: Path, members: list[Member], mine: list[Member], find_older: FindOlder
) -> Work:
    """The runs that are left, on all processes.

    A wave that has begun goes on whole, as its checkpoints hold all of its runs: those
    that are not asked for any more, too. It belongs to the part that has the first of
    its runs that the comparison asks for.

    Args:
      workdir: of the comparison, or none.
      members: all runs of the comparison.
      mine: those of this part.
      find_older: asked where a run is left.

    Raises:
      UserError: a folder holds another run, or files there are damaged.
    """
    configs, mine_names = dict(members), [member.name for member in mine]
    found = multihost.on_leader(look, workdir, configs, mine_names, find_older)
    configs |= {n: ConfigDict(to_tuples(c)) for n, c in found["recalled"].items()}
    elsewhere = set(found["elsewhere"])
    return Work(
        members=[Member(name, configs[name]) for name in found["planned"]],
        begun=found["begun"],
        mine=[member for member in mine if member.name not in elsewhere],
    )


def look(
    workdir: Path,
    configs: dict[str, ConfigDict],
    mine: Sequence[str],
    find_older: FindOlder,
) -> dict[str, Any]:
    """As `find_work`, on the leader: what JSON can hold."""
    left = [n for n in mine if not is_finished(name_folder(workdir, n), configs[n])]
    begun, elsewhere, recalled = [], [], {}
    waves = read_waves(workdir / "checkpoints")
    waves |= find_older(workdir) if left else {}
    for names in waves.values():
        unfinished = [name for name in names if name in left]
        if not goes_on(workdir, names, unfinished, configs):
            continue
        if next(name for name in names if name in configs) not in mine:
            elsewhere += unfinished
            continue
        begun.append(names)
        for name in names:
            if name not in configs:
                like = configs[unfinished[0]]
                recalled[name] = recall(name_folder(workdir, name), like).to_dict()
    planned = [name for names in begun for name in names]
    planned += [name for name in left if name not in elsewhere]
    return {
        "planned": list(dict.fromkeys(planned)),
        "begun": begun,
        "elsewhere": elsewhere,
        "recalled": recalled,
    }


def goes_on(
    workdir: Path,
    names: Sequence[str],
    unfinished: Sequence[str],
    configs: dict[str, ConfigDict],
) -> bool:
    """Whether a wave that has begun is taken up again.

    Not if it is finished, if the rows of a run that it lacks were removed, which starts
    again, or if nothing has the config of a run that it needs.
    """
    holds = lambda name, file: (name_folder(workdir, name) / file).is_file()
    known = all(name in configs or holds(name, "config.json") for name in names)
    begun = all(holds(name, METRICS) for name in unfinished)
    return bool(unfinished) and known and begun


def recall(folder: Path, like: ConfigDict) -> ConfigDict:
    """The config of a run that is not asked for, for a wave with one that is.

    Args:
      folder: of the run.
      like: config of the other, which gives it the fields that may change, and those
        that neither of them uses.
    """
    saved = read_config(folder / "config.json")
    config, given = fill_defaults(saved), flatten(like.to_dict())
    idle = list_free_fields(saved, config) & list_free_fields(like.to_dict(), like)
    free = idle & given.keys()
    config.update_from_flattened_dict({name: given[name] for name in free})
    return config
