"""Work folders: each holds one run or comparison, and goes on with that one."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.config import (
    describe_field,
    list_free_fields,
    list_options,
    list_values,
    to_tuples,
)
from fedmoe_jax.data.partition import load_partition, save_partition
from fedmoe_jax.options import UserError, fits_kind, show
from fedmoe_jax.pretrained.weights import digest
from fedmoe_jax.report import forms
from fedmoe_jax.report.rows import check_count, read_metrics
from fedmoe_jax.runtime.files import (
    flatten,
    plain,
    read_arrays,
    read_json,
    write_atomically,
    write_json,
)
from fedmoe_jax.runtime.folders import resolve_folder
from fedmoe_jax.runtime.lock import LOCK, lock
from fedmoe_jax.runtime.seals import CONFIG, METRICS, SEALS, find_broken, is_sealed
from fedmoe_jax.tables import list_defaults, list_plugins
from fedmoe_jax.train import checkpoint
from fedmoe_jax.types import Partition

# Fields that a comparison lacks: its members have them.
PER_MEMBER = {"strategy", "seed"}


@contextlib.contextmanager
def own_workdir(
    workdir: Path, config: ConfigDict, *, shared: bool = False
) -> Iterator[None]:
    """Holds the work folder for the run or comparison that `config` describes.

    Args:
      workdir: created if absent.
      config: is recorded in its `config.json`.
      shared: whether other processes may have parts of the comparison.

    Raises:
      UserError: the folder cannot be written, is in use or holds another run.
    """
    with contextlib.ExitStack() as owned:
        try:
            check_workdir(workdir, config)
            workdir.mkdir(parents=True, exist_ok=True)
            owned.enter_context(lock(workdir, shared=shared))
            if not shared:
                remove_parts(workdir)
            check_workdir(workdir, config)  # nobody else changes it now
            record_config(workdir, config)
        except OSError as error:
            raise UserError(
                f"workdir={workdir} cannot be used ({error.strerror or error}); "
                "allowed: a folder that can be written"
            ) from None
        yield


def remove_parts(workdir: Path) -> None:
    """Removes what killed processes were writing, in a folder that is owned alone.

    Also in its runs, unless another process has one of them.
    """
    for where in ("*.part", "figures/*.part", "checkpoints/*/*.part"):
        for part in workdir.glob(where):
            part.unlink(missing_ok=True)
    for run in {part.parent for part in workdir.glob("runs/*/*.part")}:
        with contextlib.suppress(UserError), lock(run):
            remove_parts(run)


def record_config(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`, if it says something else; seals are of what it was."""
    path, fields = workdir / CONFIG, plain(config.to_dict())
    if not path.exists() or read_json(path) != fields:
        (workdir / SEALS).unlink(missing_ok=True)
        write_json(path, fields)


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Checks that a folder is new, or has what `config` describes.

    A run that ended before its first round has left nothing that is worth keeping.

    Raises:
      UserError: it holds another run.
    """
    recorded = workdir / "config.json"
    if recorded.exists() and has_begun(workdir):
        check_same_run(read_config(recorded), config)
    elif recorded.exists():
        check_version(read_config(recorded), config)
    elif (workdir / "metrics.jsonl").exists() or (workdir / "checkpoints").exists():
        raise UserError(
            f"workdir={workdir} holds a run without its config.json; "
            "allowed: a new folder, or one with the run to resume"
        )


def check_free(workdir: Path, shared: bool = False) -> None:
    """Checks that no other process has the work folder, before anything is planned.

    Args:
      workdir: of the run or comparison.
      shared: whether others may have parts of the comparison.

    Raises:
      UserError: one has.
    """
    if (workdir / LOCK).exists():
        with contextlib.suppress(OSError), lock(workdir, shared=shared):
            pass


def check_version(saved: dict[str, Any], config: ConfigDict) -> None:
    """Checks that a run was not started before a field existed that it uses today.

    Args:
      saved: the nested config of the run, as read from `config.json`.
      config: given now.

    Raises:
      UserError: it was.
    """
    own = list_options().keys() - list_defaults().keys() - PER_MEMBER
    missing = own & flatten(config.to_dict()).keys() - flatten(saved).keys()
    missing -= list_free_fields(saved, config)
    if missing:
        raise UserError(
            "the run in this folder was started with an older version of fedmoe_jax, "
            f"which had no field {min(missing)}; allowed: that version, or another "
            "workdir"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The nested config of a run or comparison, as its `config.json` has it.

    Fields that have come since may be missing.

    Raises:
      UserError: the file cannot be read, or a field holds something else.
    """
    saved = read_json(path)
    forms.check_fields(to_tuples(saved), make_forms(), path)
    forms.check_fields(saved, forms.PLUGINS, path)
    if "compare" in saved:
        forms.check_fields(saved, forms.COMPARISON, path)
    return saved


def make_forms() -> dict[str, forms.Form]:
    """What every field of a recorded config must hold: the kind of its default."""
    defaults = list_values(repr(list_defaults()))
    return {
        name: forms.Form(
            functools.partial(fits_kind, default=default),
            describe_field(name),
            needed=False,
        )
        for name, default in defaults.items()
    }


def has_begun(workdir: Path) -> bool:
    """Whether a run or comparison in the folder has a round or checkpoint."""
    kept = (workdir / "metrics.jsonl", *workdir.glob("runs/*/metrics.jsonl"))
    rows = any(path.is_file() and path.stat().st_size > 0 for path in kept)
    steps = (workdir.glob(f"checkpoints/{at}[0-9]*") for at in ("", "*/", "*/frozen/"))
    return rows or any(map(any, steps))


def check_plugins(workdir: Path) -> None:
    """Checks that the run in the folder, if there is one, has the plug-ins given now.

    Raises:
      UserError: it has others.
    """
    if not (workdir / "config.json").exists() or not has_begun(workdir):
        return
    recorded = tuple(read_config(workdir / CONFIG).get("plugins", ()))
    if recorded != list_plugins():
        given, names = (
            ",".join(list_plugins()) or "none",
            ", ".join(map(repr, recorded)),
        )
        allowed = "a process without plug-ins"
        if recorded:
            flag = f"--plugins={','.join(recorded)}"
            allowed = f"{flag} (from Python load_plugins({names})) in this order"
        raise UserError(
            f"plug-ins {given} are not allowed; allowed: {allowed}, as the run in "
            f"{workdir} was started, or another folder"
        )


def check_same_run(saved: dict[str, Any], config: ConfigDict) -> None:
    """Checks that `config` continues the run whose `config.json` was read.

    Raises:
      UserError: it was started with an older version, a field differs that may not, or
        the run would become shorter.
    """
    check_version(saved, config)
    free = list_free_fields(saved, config)
    checkpoint.check_config(saved, config.to_dict(), free)
    if config.num_rounds < saved["num_rounds"]:
        raise UserError(
            f"num_rounds={config.num_rounds} is not allowed; allowed: at least "
            f"{saved['num_rounds']}, what the run in this folder was started with"
        )


def keep_partition(path: Path, partition: Partition, begun: bool) -> None:
    """Saves the partition, or checks that it is what the run was begun with.

    Raises:
      UserError: the run in this folder was begun with another partition.
    """
    if not begun or not path.exists():
        save_partition(path, partition)
        return
    saved = load_partition(path)
    if not all(map(np.array_equal, saved, partition)):
        raise UserError(
            f"{path} is not the partition that this config and data give; allowed: the "
            "data and NumPy version that the run was started with, or a new workdir"
        )


def keep_devices(path: Path, csv: str, begun: bool) -> None:
    """Copies the file of one's own devices, or checks that a run has begun with it.

    Raises:
      UserError: the run in this folder was started with other devices.
    """
    text = Path(os.path.expanduser(csv)).read_text(encoding="utf-8-sig")
    if not begun or not path.exists():
        write_atomically(path, text)
    elif path.read_bytes() != text.encode():
        raise UserError(
            f"devices.csv={csv} has changed since the run was started, which is not "
            f"allowed; allowed: what {path} has kept of it, copied back, or a new "
            "workdir"
        )


def keep_base(path: Path, folder: str, begun: bool) -> None:
    """Keeps the digest of a pretrained base, or checks that a run has begun with it.

    Raises:
      UserError: the run in this folder was started with other weights.
    """
    found = digest(resolve_folder("model.base", folder))
    if not begun or not path.exists():
        write_json(path, {"base": folder, "sha256": found})
    elif read_json(path).get("sha256") != found:
        raise UserError(
            f"model.base={show(folder)} has changed since the run was started, which "
            f"is not allowed; allowed: the files whose digest {path} has kept, or a "
            "new workdir"
        )


@contextlib.contextmanager
def own_run(workdir: Path, config: ConfigDict, partition: Partition) -> Iterator[None]:
    """Holds a run's folder, with its config, partition and devices.

    The run is going to be driven, so a summary that is there holds no longer.

    Raises:
      UserError: the folder cannot be written, is in use or holds another run.
    """
    with own_workdir(workdir, config):
        keep_run(workdir, config, partition)
        yield


def keep_run(workdir: Path, config: ConfigDict, partition: Partition) -> None:
    """Keeps what a run is started with in its folder, see `own_run`."""
    begun = has_begun(workdir)
    keep_partition(workdir / "partition.npz", partition, begun)
    if config.devices.csv:
        keep_devices(workdir / "devices.csv", config.devices.csv, begun)
    if config.model.base:
        keep_base(workdir / "base.json", config.model.base, begun)
    for name in (SEALS, "summary.json"):
        (workdir / name).unlink(missing_ok=True)


def is_finished(workdir: Path, config: ConfigDict) -> bool:
    """Whether a folder holds the whole run that `config` describes.

    Raises:
      UserError: it holds another run.
    """
    if not (workdir / "summary.json").exists():
        return False
    check_unchanged(workdir, CONFIG)
    check_same_run(read_config(workdir / CONFIG), config)
    if not is_whole(workdir):
        return False
    return read_json(workdir / "summary.json")["num_rounds"] >= config.num_rounds


def is_whole(workdir: Path) -> bool:
    """Whether the files of a finished run are as it wrote them.

    Without seals, as older versions leave it, they are whole where they can be read.

    Raises:
      UserError: its rows are not, which nothing can make again.
    """
    check_unchanged(workdir, METRICS)
    rows = read_metrics(workdir / METRICS)
    forms.check_rows(rows, workdir / METRICS)
    path = workdir / "summary.json"
    try:
        if find_broken(workdir):
            return False
        summary = read_json(path)
        forms.check_fields(summary, forms.SUMMARY, path)
        if not is_sealed(workdir):
            check_results(workdir)
    except UserError:
        return False
    check_count(workdir / METRICS, rows, summary["num_rounds"])
    return True


def check_results(workdir: Path) -> None:
    """Raises UserError unless a run's `final.npz` has what a report draws."""
    path = workdir / "final.npz"
    arrays = read_arrays(path)
    forms.check_arrays(arrays, path)
    forms.check_codes(arrays, read_json(workdir / CONFIG), path)


def check_unchanged(workdir: Path, name: str) -> None:
    """Checks a sealed file that nothing can make again.

    Raises:
      UserError: it is not as the run wrote it.
    """
    try:
        broken = find_broken(workdir)
    except UserError:  # the seals are damaged, and made again
        return
    if name in broken:
        raise UserError(
            f"{workdir / name} is not as the run has written it; allowed: that file "
            f"restored, or {workdir} removed to run again"
        )
