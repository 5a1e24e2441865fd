"""Runs from Python: `run` a config, `load_run` a folder, `predict` with its model.

`fedmoe_jax` itself hands on these names, without importing JAX before one is used.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.config import fill_defaults, validate
from fedmoe_jax.disclosure.observed import join_chunks, read_observed
from fedmoe_jax.evaluation.scoring import evaluation_route
from fedmoe_jax.evaluation.sources import choose_batch
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.program import Program
from fedmoe_jax.report.rows import Row, read_metrics
from fedmoe_jax.runtime.folders import resolve_folder
from fedmoe_jax.runtime.settings import tell_settings
from fedmoe_jax.runtime.xla import keep_host, set_cpu_devices
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.loop import drive, ignore_row, restore_frozen
from fedmoe_jax.train.plan import Member, Plan, Wave, plan_waves
from fedmoe_jax.train.run import build_job, tell_notes, tell_room, train
from fedmoe_jax.train.sweep import name_wave
from fedmoe_jax.train.waves import read_waves
from fedmoe_jax.train.workdir import (
    check_free,
    check_plugins,
    check_version,
    keep_base,
    read_config,
)
from fedmoe_jax.types import PyTree, SimState


class Run(NamedTuple):
    """One run, finished or not.

    Attributes:
      config: its config.
      rows: field of the rows -> its values, [rounds, ...] float64 with NaN where a
        round has none, int64 where all are whole; the fields of `metrics.jsonl`.
      state: the simulation after its newest round or checkpoint, NumPy leaves, the key
        as its data, without an axis S; None where no checkpoint is found: none is saved
        yet, or the folder is a copy without them.
      frozen: the parts of the model that are not trained; None likewise.
      plan: its program, data and federation; None likewise.
      observed: with `privacy.observe` what was seen of its clients, name -> array
        [rounds, C, ...], see `observer.see_round`; None without.
    """

    config: ConfigDict
    rows: dict[str, np.ndarray]
    state: SimState | None
    frozen: PyTree
    plan: Plan | None
    observed: dict[str, np.ndarray] | None = None

    @property
    def params(self) -> PyTree:
        """The server's `{"stem", "gate", "experts", "head"}`; None without a state."""
        return self.state and self.state.params

    def __repr__(self) -> str:
        rounds = len(self.rows.get("round", ()))
        return f"Run(strategy={self.config.strategy!r}, {rounds} rounds)"


def run(
    config: ConfigDict,
    workdir: str | Path | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Run:
    """Runs one config, with progress on stdout.

    Signals are the caller's, unlike those of `launch.py`: a KeyboardInterrupt ends the
    run at once, and the next call goes on from the newest checkpoint, up to
    `checkpoint.every` rounds before.

    Args:
      config: of one run, from `fedmoe_jax.configs.default.get_config()` say.
      workdir: its folder, as of `launch.py`; a run there is resumed. None writes
        nothing to disk.
      on_row: called after each chunk with the row of each of its rounds, a dict of
        numbers and lists; None for no call.

    Raises:
      UserError: a mistake in the config, the data or the folder.
    """
    on_row = on_row or ignore_row
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config is a {type(config).__name__}; allowed: a ConfigDict, as "
            "fedmoe_jax.configs.default.get_config() returns"
        )
    config = ConfigDict(config.to_dict())
    if "compare" in config:
        raise UserError("compare is not allowed here; allowed: a config of one run")
    validate(config)
    adopt_devices(config.run.num_devices)
    tell_settings()
    if workdir is not None:
        folder = resolve_folder("workdir", workdir)
        check_plugins(folder)
        check_free(folder)
        train(
            config,
            folder,
            stop=lambda: False,
            label=config.strategy,
            profile=False,
            on_row=on_row,
        )
        return load_run(folder)
    rows, chunks = [], []

    def take(row: Row) -> None:
        rows.append(row)
        on_row(row)

    (wave,) = plan_waves([Member(config.strategy, config)])
    tell_notes(wave)
    job = build_job(wave, [None], drives=True)
    tell_room(wave)
    job = job._replace(on_row=take, on_observed=chunks.append)
    end = drive(config, job, None, stop=lambda: False, profile=None)
    kept = take_run(end.state, end.inputs)
    return Run(config, stack_rows(rows), *kept, wave.plans[0], join_chunks(chunks))


def load_run(folder: str | Path) -> Run:
    """Reads a finished or running run, with its newest intact checkpoint.

    It loads the run's data set, for the shapes and statistics of the model. Runs of a
    comparison share checkpoints with others, which are planned, too.

    Args:
      folder: a run's own, `WORKDIR` or, in a comparison, `WORKDIR/runs/NAME`.

    Raises:
      UserError: the folder holds no run, one of an older version or with other
        plug-ins; no checkpoint is intact; or its data are not there.
    """
    folder = resolve_folder("folder", folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"folder={folder} is not allowed; allowed: one with a run's config.json"
        )
    check_plugins(folder)
    saved = read_config(folder / "config.json")
    if "compare" in saved:
        raise UserError(
            f"folder={folder} holds a comparison; allowed: one of its runs/ folders"
        )
    config = fill_defaults(saved)
    check_version(saved, config)
    if (folder / "base.json").is_file():
        keep_base(folder / "base.json", config.model.base, begun=True)
    rows = stack_rows(read_metrics(folder / "metrics.jsonl"))
    adopt_devices(config.run.num_devices)
    wave, checkpoints = find_wave(folder.resolve(), config)
    seen = read_observed(folder)
    if not checkpoints.is_dir():
        return Run(config, rows, None, None, None, seen)
    job = build_job(wave, [None] * len(wave.names))
    found = checkpoint.read_latest(checkpoints, job.state)
    if found is None:
        return Run(config, rows, None, None, None, seen)
    state = found.state
    inputs = restore_frozen(job, checkpoints, found.step)
    number = wave.names.index(folder.resolve().name)
    kept = take_run(state, inputs, number)
    return Run(config, rows, *kept, wave.plans[number], seen)


def find_wave(folder: Path, config: ConfigDict) -> tuple[Wave, Path]:
    """The runs that share checkpoints with the run in a folder, and these.

    Args:
      folder: of the run, absolute.
      config: of the run.
    """
    name, study, members = folder.name, folder.parent.parent, find_members(folder)
    for checkpoints, names in read_waves(study / "checkpoints").items():
        if name in names and folder.parent.name == "runs":
            members = find_siblings(folder, names, members)
            wave = next(w for w in plan_waves(members, [names]) if name in w.names)
            return wave, checkpoints
    if name not in [member.name for member in members]:
        (wave,) = plan_waves([Member(name, keep_devices(config, folder))])
        return wave, folder / "checkpoints"
    waves = plan_waves(members)  # of a version that did not record them
    wave = next(wave for wave in waves if name in wave.names)
    return wave, study / "checkpoints" / name_wave(wave)


def find_siblings(
    folder: Path, names: Sequence[str], members: Sequence[Member]
) -> list[Member]:
    """The runs that share checkpoints with the one in a folder.

    Args:
      folder: of the run.
      names: of the runs.
      members: of the comparison as its config has it, for runs without a folder.

    Raises:
      UserError: nothing has the config of one.
    """
    known, found = dict(members), []
    for name in names:
        sibling = folder.with_name(name)
        if name not in known or (sibling / "config.json").is_file():
            config = fill_defaults(read_config(sibling / "config.json"))
            known[name] = keep_devices(config, sibling)
        found.append(Member(name, known[name]))
    return found


def find_members(folder: Path) -> list[Member]:
    """The runs of the comparison that has a run's folder; none for a run alone."""
    recorded = folder.parent.parent / "config.json"
    study = read_config(recorded) if recorded.is_file() else {}
    if folder.parent.name != "runs" or "compare" not in study:
        return []
    return [
        Member(name, keep_devices(config, folder.with_name(name)))
        for name, config in list_members(fill_defaults(study))
    ]


def predict(
    run: Run, inputs: np.ndarray | PyTree, client: int | None = None
) -> np.ndarray:
    """The outputs of a run's model for new inputs, routed over all experts.

    It is the model of the global accuracy: top-A of all E experts.

    Args:
      run: from `run` or `load_run`.
      inputs: rows as the data set has them, leaves [B, ...] by name, without the
        targets; of images the array alone will do, uint8 [B, H, W, F], or [B, H, W]
        where F is 1.
      client: in [0, N), whose model to take where parts of it are personal.

    Returns:
      [B, ...] outputs of the model: of images [B, L] float32, logits of the classes, or
      the logarithms of their probabilities where the strategy mixes probabilities.

    Raises:
      UserError: inputs of another shape or dtype, a client that is missing or not
        needed, or a run without a state.
    """
    if run.state is None or run.plan is None:
        raise UserError(
            "run has no state, as no checkpoint was found; allowed: one with a state"
        )
    program, federation = run.plan.program, run.plan.federation
    rows = fill_rows(run.plan.data.test, inputs)
    personal = take_client(run.state.personal, client)
    params, fixed = jax.device_put((run.params, run.frozen))  # once for all batches
    apply = lambda rows: apply_model(
        program, params, fixed, personal, federation.statistics, rows
    )
    most = choose_batch(program)
    starts = range(0, len(jax.tree.leaves(rows)[0]), most)
    take = lambda start: {name: x[start : start + most] for name, x in rows.items()}
    return np.concatenate([apply(take(start)) for start in starts])


def fill_rows(like: PyTree, inputs: np.ndarray | PyTree) -> PyTree:
    """Rows with all leaves of a data set; those that are not given are zeros.

    Raises:
      UserError: leaves that the data set has not, or of another shape or dtype.
    """
    given = inputs if isinstance(inputs, dict) else {"x": inputs}
    given = {name: np.asarray(leaf) for name, leaf in given.items()}
    for name, leaf in given.items():
        if name in like and (*leaf.shape[1:], 1) == like[name].shape[1:]:
            given[name] = leaf[..., None]
    for name, leaf in given.items():
        wanted = like.get(name)
        fits = wanted is not None and (leaf.shape[1:], leaf.dtype) == (
            wanted.shape[1:],
            wanted.dtype,
        )
        if not fits or not len(leaf):
            allowed = {
                n: f"{x.dtype}[B{''.join(f', {s}' for s in x.shape[1:])}]"
                for n, x in like.items()
            }
            raise UserError(
                f"inputs[{name!r}] is {leaf.dtype}{list(leaf.shape)}; allowed: "
                + ", ".join(f"{n!r} {shape}" for n, shape in allowed.items())
            )
    count = len(next(iter(given.values())))
    empty = lambda leaf: np.zeros((count, *leaf.shape[1:]), leaf.dtype)
    return {name: given.get(name, empty(leaf)) for name, leaf in like.items()}


@functools.partial(jax.jit, static_argnums=0)
def apply_model(
    program: Program,
    params: PyTree,
    frozen: PyTree,
    personal: PyTree,
    statistics: PyTree,
    rows: PyTree,
) -> PyTree:
    """Outputs of the whole model, with ONE client's own parts or {}."""
    strategy, sizes = program.strategy, program.sizes
    shape = sizes.num_layers, sizes.num_experts
    everything = jnp.broadcast_to(jnp.arange(sizes.num_experts), shape)
    whole = take_submodel(params, personal, everything, strategy.local_experts)
    whole |= {part: frozen[part] for part in strategy.frozen}
    batch, slots = program.task.prepare(rows, statistics), jnp.ones(shape, bool)
    held = everything, slots, evaluation_route(program)
    outputs, _ = program.model.apply(whole, frozen, batch, *held, None)
    return outputs


def take_client(personal: PyTree, client: int | None) -> PyTree:
    """ONE client's own parts, {} where the server has all.

    Raises:
      UserError: see `predict`.
    """
    if not personal:
        if client is not None:
            raise UserError(
                f"client={client} is not allowed; allowed: None, as the server has all "
                "of this model"
            )
        return {}
    most = len(jax.tree.leaves(personal)[0]) - 1
    if client is None or not 0 <= client <= most:
        raise UserError(
            f"client={client} is not allowed; allowed: 0 to {most}, as parts of this "
            f"model are personal ({', '.join(personal)})"
        )
    return jax.tree.map(lambda leaf: leaf[client], personal)


@functools.cache
def adopt_devices(num_devices: int) -> None:
    """Sets the CPU's devices as `launch.py` does, or says that it is too late."""
    try:
        set_cpu_devices(num_devices)
    except RuntimeError:
        found = f"{jax.device_count()} {jax.default_backend()} device(s)"
        print(f"JAX was initialised before; its {found} are used as they are")
    else:
        keep_host()


def keep_devices(config: ConfigDict, folder: Path) -> ConfigDict:
    """The config with the copy of the user's device file that the folder keeps."""
    config = ConfigDict(config.to_dict())
    if config.devices.csv and (folder / "devices.csv").is_file():
        config.devices.csv = str(folder / "devices.csv")
    return config


def take_run(
    state: SimState, inputs: tuple[PyTree, PyTree], number: int = 0
) -> tuple[SimState, PyTree]:
    """State and frozen parts of one run of a wave, on the host, with its base."""
    take = lambda tree: jax.tree.map(lambda leaf: leaf[number], tree)
    federation = inputs[0]
    fixed = take(federation.frozen) | federation.base
    return to_host(take(state)), jax.device_get(fixed)


def to_host(state: SimState) -> SimState:
    """The state with NumPy leaves, its key as the key's data."""
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def stack_rows(rows: list[Row]) -> dict[str, np.ndarray]:
    """Rows of `metrics.jsonl` as arrays over rounds, see `Run.rows`."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: stack_values([row.get(name) for row in rows]) for name in names}


def stack_values(values: list[Any]) -> np.ndarray:
    """Numbers or equally long lists of numbers; None is NaN, alone or in a list."""
    if all(isinstance(value, int) for value in values):
        return np.array(values)
    arrays = [None if value is None else np.array(value, float) for value in values]
    shape = next((array.shape for array in arrays if array is not None), ())
    gap = np.full(shape, np.nan)
    return np.stack([gap if array is None else array for array in arrays])
