"""Checkpoints: the `SimState` on disk, checked bit for bit when it is read back.

A folder holds one subfolder per saved round, `40/` say, and `frozen/` with the parts of
the model that a run has frozen itself, saved once in the same way. Orbax writes a
subfolder in the background under a temporary name and renames it when it is complete,
so a killed save never looks like a step. Orbax does not notice flipped bits; therefore
each step also stores the sha256 of every leaf.

A step that cannot be read, does not match its sha256 or is another step under this
number is passed over for the one before it. Once an older step proves intact, the
damaged ones are renamed, `40.damaged`: their rounds can be saved again, and nothing is
deleted.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import brief, flatten, plain
from fedmoe_jax.runtime.settings import check_settings, read_settings
from fedmoe_jax.types import Array, PyTree

# name of the leaf -> [dtype and shape, sha256 of the values]
Leaves = dict[str, list[str]]


class Found(NamedTuple):
    """A checkpoint that was read back.

    Attributes:
      state: the saved pytree.
      step: rounds done.
      rows: the sha256 of each run's rows until then; none in older checkpoints.
    """

    state: PyTree
    step: int
    rows: list[str]


@contextlib.contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Yields the checkpoints in `folder`, which is made if need be.

    Leaving the `with` waits for a save under way. What killed saves left behind is
    deleted.

    Args:
      folder: where the steps are.
      keep: how many of the newest steps to keep, >= 1.

    Raises:
      UserError: the folder cannot be written, or a save has failed.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
    )
    with _writing(folder):
        store = ocp.CheckpointManager(Path(folder).absolute(), options=options)
    try:
        yield store
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            store.close()
        raise
    with _writing(folder):
        store.close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax has no common class for a save that failed
        reason = _find_reason(error)
        if not reason:
            multihost.await_news()
        raise UserError(
            f"checkpoints in {folder} cannot be saved ({reason or brief(error)}); "
            "allowed: a folder that can be written and has room, then the same call "
            "goes on after the newest checkpoint"
        ) from None


def _find_reason(error: Exception) -> str:
    """The system's error behind a failed save, which TensorStore writes last, or ""."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for known in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(known) in str(error):
            return os.strerror(known)
    return ""


def save(
    store: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    rows: Sequence[str] = (),
) -> None:
    """Starts saving `state` as round `step`; the state may be donated right after.

    Waits for the save before, if that is still under way. Every process calls it;
    every leaf is replicated over the processes or lies wholly on this one.

    Args:
      store: from `open_checkpoints`.
      step: rounds done.
      state: arrays.
      rows: see `Found`; of the leader alone.

    Raises:
      UserError: this save or the one before failed.
      RuntimeError: a step that is as new or newer exists.
    """
    leaves = {name: [_spec(leaf), _sha256(leaf)] for name, leaf in _named(state)}
    meta = {"leaves": leaves, "sha256": _sha256_of_list(leaves), "step": step}
    meta |= {"rows": list(rows), "settings": read_settings()}
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(jax.tree.map(_one_copy, state)),
        meta=ocp.args.JsonSave(meta),
    )
    with _writing(store.directory):
        saved = store.save(step, args=arguments)
    if not saved:
        newest = store.latest_step()
        raise RuntimeError(f"step {step} was not saved: the newest step is {newest}")


def read_latest(folder: Path, like: PyTree) -> Found | None:
    """As `restore_latest`, and changes nothing on disk: a run may be under way there.

    Args:
      folder: where the steps are, or none.
      like: see `restore_latest`.
    """
    if not Path(folder).is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as store:
        found, _ = _find_latest(store, like)
    return found


def restore_latest(
    store: ocp.CheckpointManager, like: PyTree, until: int | None = None
) -> Found | None:
    """The newest intact checkpoint; None where nothing was ever saved.

    Args:
      store: from `open_checkpoints`.
      like: the state expected, of arrays or of `jax.ShapeDtypeStruct` with a sharding;
        the restored leaves take its shardings.
      until: the newest round that is allowed; None for any.

    Raises:
      UserError: the state on disk has other leaves, shapes or dtypes than `like` or
        was computed under other settings of JAX, or there are steps and none is intact.
    """
    found, damaged = _find_latest(store, like, until, check_settings)
    if found:
        _set_aside(store, damaged, found.step)
    return found


def _find_latest(
    store: ocp.CheckpointManager,
    like: PyTree,
    until: int | None = None,
    check: Callable[[dict, str], None] = lambda settings, where: None,
) -> tuple[Found | None, dict[int, str]]:
    """The newest intact checkpoint, and what is wrong with newer steps."""
    damaged = {}
    steps = [step for step in store.all_steps() if until is None or step <= until]
    for step in sorted(steps, reverse=True):
        found = None
        try:
            found = _read(store, step, like, check)
        except UserError:
            raise
        except Exception as error:  # Orbax has no common class for damaged files
            multihost.await_news()
            damaged[step] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            logging.warning("checkpoint %d is damaged: %s", step, damaged[step])
        if not multihost.any_process(found is None):
            return found, damaged
        damaged.setdefault(step, "another process cannot read it")
    if damaged:
        reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise UserError(
            f"no checkpoint in {store.directory} is intact ({reasons}); "
            "remove that folder to start again from round 0"
        )
    return None, damaged


def _read(
    store: ocp.CheckpointManager,
    step: int,
    like: PyTree,
    check: Callable[[dict, str], None],
) -> Found:
    """One step. Raises UserError if it does not fit, anything else if it is damaged."""
    read = store.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    meta = read.meta
    leaves, where = meta["leaves"], f"checkpoint {step} in {store.directory}"
    if _sha256_of_list(leaves) != meta["sha256"]:
        raise ValueError("the list of leaves does not match its sha256")
    if meta.get("step", step) != step:  # older checkpoints do not say
        raise ValueError(f"it is step {meta['step']} under another number")
    check(meta.get("settings", {}), where)
    _check_fit(leaves, like, where)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restore = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    state = store.restore(step, args=restore).state
    for name, leaf in _named(state):
        if _sha256(leaf) != leaves[name][1]:
            raise ValueError(f"{name} does not match its sha256")
    _check_round(state, step)
    return Found(state, step, meta.get("rows", []))


def _check_round(state: PyTree, step: int) -> None:
    """Raises ValueError where a simulation is of another round than its number."""
    if hasattr(state, "round"):
        found = np.unique(_on_host(state.round))
        if found.tolist() != [step]:
            raise ValueError(f"it is of round {found.max()} under another number")


def _set_aside(store: ocp.CheckpointManager, damaged: dict, step: int) -> None:
    if not damaged:
        return
    logging.warning("falling back to checkpoint %d in %s", step, store.directory)
    if multihost.is_leader():
        for number in damaged:
            folder = Path(store.directory) / str(number)
            names = (f"{folder}.damaged{n or ''}" for n in itertools.count())
            folder.rename(next(name for name in names if not Path(name).exists()))
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    store.reload()


def _check_fit(leaves: Leaves, like: PyTree, where: str) -> None:
    saved = {name: spec for name, (spec, _) in leaves.items()}
    given = {name: _spec(leaf) for name, leaf in _named(like)}
    wrong = _differences(saved, given)
    if wrong:
        more = f", and {len(wrong) - 3} more leaves" if len(wrong) > 3 else ""
        raise UserError(
            f"{where} does not fit the config: {', '.join(wrong[:3])}{more}; allowed: "
            "the config and the version that it was saved with, or another workdir"
        )


def check_config(saved: dict, current: dict, free: frozenset[str]) -> None:
    """Checks that a run is continued with the config it was started with.

    Args:
      saved: the nested config of the run, as read from `config.json`.
      current: the nested config given now.
      free: dotted names of fields that may differ, `checkpoint.every` say.

    Raises:
      UserError: another field differs or is in only one of the two.
    """
    pairs = _differences(flatten(plain(saved)), flatten(plain(current)))
    wrong = [pair for pair in pairs if pair.split(":")[0] not in free]
    if wrong:
        raise UserError(
            f"the config differs from that of the run to be resumed: "
            f"{', '.join(wrong)}; allowed: the old values, or another workdir"
        )


def _differences(saved: dict, given: dict) -> list[str]:
    """`field: saved -> given` of every field that is not the same in both."""
    names = sorted(saved.keys() | given.keys())
    pairs = (
        (name, saved.get(name, "absent"), given.get(name, "absent")) for name in names
    )
    return [f"{name}: {was} -> {now}" for name, was, now in pairs if was != now]


def _named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _spec(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _one_copy(leaf: Array) -> Array:
    """The copy on the first device of a leaf that all devices of one process have.

    Otherwise Orbax writes a slice of it from every device, each cut by a program that
    has to be compiled.
    """
    whole = leaf.is_fully_replicated and leaf.is_fully_addressable
    return leaf.addressable_data(0) if whole else leaf


def _sha256(leaf: Array) -> str:
    is_key = jax.dtypes.issubdtype  # pyright: ignore[reportPrivateImportUsage] is public
    if is_key(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return hashlib.sha256(_on_host(leaf).tobytes()).hexdigest()


def _on_host(leaf: Array) -> np.ndarray:
    """The values of a leaf that all devices have, or those of one process."""
    values = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    return np.ascontiguousarray(values)


def _sha256_of_list(leaves: Leaves) -> str:
    text = json.dumps(leaves, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
