"""Runs that advance together as one program, from their plans to finished folders."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fedmoe_jax.base import BASE, Data
from fedmoe_jax.capacity import Belief
from fedmoe_jax.config import list_idle_fields
from fedmoe_jax.disclosure.accounting import account, describe_privacy
from fedmoe_jax.disclosure.exposure import build_expose_share
from fedmoe_jax.disclosure.observed import EXPOSED
from fedmoe_jax.disclosure.reads import find_reads
from fedmoe_jax.evaluation.evaluate import build_evaluate_share
from fedmoe_jax.evaluation.finetune import build_finetune_share
from fedmoe_jax.measures import MEASURES, pack_measures
from fedmoe_jax.pretrained.weights import digest
from fedmoe_jax.program import Program, find_overwritten
from fedmoe_jax.report.rows import Row, read_metrics
from fedmoe_jax.report.summary import describe_speed, make_summary
from fedmoe_jax.round import scan_rounds
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import write_arrays, write_json
from fedmoe_jax.runtime.folders import resolve_folder
from fedmoe_jax.runtime.origin import find_origin
from fedmoe_jax.runtime.seals import seal
from fedmoe_jax.runtime.sharding import RUNS, map_runs, place, spread
from fedmoe_jax.state import init_state, run_stage
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.train.loop import (
    PROGRAMS_KEPT,
    Job,
    Programs,
    compile_ahead,
    compile_once,
    drive,
    ignore_row,
)
from fedmoe_jax.train.origins import summarise_origins
from fedmoe_jax.train.plan import (
    Member,
    Plan,
    Wave,
    load_data,
    note_room,
    plan_waves,
)
from fedmoe_jax.train.workdir import is_finished, own_run
from fedmoe_jax.types import (
    PER_RUN,
    AlignState,
    Array,
    Federation,
    Hyper,
    Partition,
    PyTree,
    SimState,
)
from fedmoe_jax.world.participation import Participation

# How the fields of a wave's federation lie on the mesh.
_SPECS: dict[str, Any] = {
    name: P(RUNS) if name in PER_RUN else P()
    for name in Federation.__dataclass_fields__
}
FEDERATION_SPEC = Federation(**_SPECS)
# Fields whose leaves end in an axis of examples, which zeros may lengthen.
LISTS = ("index", "own_test", "validation", "unseen")


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    stop: Callable[[], bool],
    label: str,
    profile: bool,
    on_row: Callable[[Row], None] = ignore_row,
) -> bool:
    """Runs or resumes one run, a wave of one; returns whether it is finished.

    Args:
      config: the run's config.
      workdir: its folder; docs/running.md says what is written there.
      stop: asked after every chunk of rounds; true saves and ends the run early.
      label: the run's name in the progress.
      profile: whether to trace a few rounds into `workdir/profile`.
      on_row: see `Job.on_row`.

    Raises:
      UserError: a mistake in config, data, folder or checkpoint; a bad config leaves
        no trace on disk.
    """
    multihost.on_leader(load_data, config)  # alone, as it may have to be prepared
    (wave,) = multihost.run_on_all(plan_waves, [Member(label, config)])
    if multihost.on_leader(is_finished, workdir, config):
        print(f"{workdir} holds all {config.num_rounds} rounds already")
        return True
    return run_wave(
        wave,
        [workdir],
        workdir / "checkpoints",
        stop=stop,
        profile=workdir / "profile" if profile else None,
        on_row=on_row,
    )


@contextlib.contextmanager
def claim_runs(plans: list[Plan], folders: list[Path]) -> Iterator[None]:
    """Owns the folder of every run; all processes wait until the leader does.

    Raises:
      UserError: see `own_run`; or the processes have different data, or other weights
        in the folder of a base.
    """
    what = "the data and their partition"
    multihost.check_equal(what, (plans[0].data, [plan.partition for plan in plans]))
    for base in sorted({plan.config.model.base for plan in plans} - {""}):
        if jax.process_count() > 1:  # reading a base takes its time
            weights = digest(resolve_folder("model.base", base))
            multihost.check_equal(f"the weights in model.base={base!r}", weights)
    with contextlib.ExitStack() as owned:

        def own() -> None:
            for plan, folder in zip(plans, folders, strict=True):
                owned.enter_context(own_run(folder, plan.config, plan.partition))

        multihost.on_leader(own)
        yield


def run_wave(
    wave: Wave,
    folders: list[Path],
    checkpoints: Path,
    *,
    stop: Callable[[], bool],
    profile: Path | None,
    on_row: Callable[[Row], None] = ignore_row,
) -> bool:
    """Runs or resumes one wave and closes its folders; returns whether it is finished.

    Args:
      wave: the runs.
      folders: of the runs.
      checkpoints: folder of their common checkpoints.
      stop: see `drive`.
      profile: see `drive`.
      on_row: see `Job.on_row`.
    """
    with claim_runs(wave.plans, folders):
        return drive_wave(wave, folders, checkpoints, stop, profile, on_row)


def drive_wave(
    wave: Wave,
    folders: list[Path],
    checkpoints: Path,
    stop: Callable[[], bool],
    profile: Path | None,
    on_row: Callable[[Row], None],
) -> bool:
    """As `run_wave`, in folders that are owned."""
    config = wave.plans[0].config
    find_origin()  # before the sources can change
    tell_notes(wave)
    job = build_job(wave, folders, drives=True)._replace(on_row=on_row)
    tell_room(wave)  # while programs compile
    end = drive(config, job, checkpoints, stop=stop, profile=profile)
    if end.done < config.num_rounds:
        return False
    state, inputs = end.state, end.inputs
    (evaluate,), _ = compile_once([job.programs.evaluate], state, *inputs)
    results = split_runs(jax.device_get(evaluate(state, *inputs)))
    kept = state.align, state.belief, state.participation
    states = split_runs(jax.device_get(kept))
    exposed = expose_runs(job, state, inputs)
    if multihost.is_leader():
        for folder, arrays in zip(folders, exposed, strict=False):
            write_arrays(folder / EXPOSED, **arrays)
        each = zip(wave.plans, folders, states, results, strict=True)
        summaries = [finish(*parts, end.spent) for parts in each]
        strategies = [plan.config.strategy for plan in wave.plans]
        lines = zip(strategies, map(describe_privacy, summaries), strict=True)
        for strategy, line in dict.fromkeys(lines):
            if line:
                print(f"{strategy}: {line}")
        print(describe_speed(summaries[-1]), flush=True)
    return True


def expose_runs(
    job: Job, state: SimState, inputs: tuple[PyTree, PyTree]
) -> list[dict[str, np.ndarray]]:
    """The losses of every run's examples, see `exposure`; [] where none are.

    None are where no run is observed or no client has a test set of its own.
    """
    if job.programs.expose is None or inputs[0].own_test is None:
        return []
    (expose,), _ = compile_once([job.programs.expose], state, *inputs)
    return split_runs(jax.device_get(expose(state, *inputs)))


def tell_notes(wave: Wave) -> None:
    """Prints the notes on the data of runs that are going to run."""
    if multihost.is_leader():
        for note in wave.plans[0].data.notes:
            tell_once(note)


def tell_room(wave: Wave) -> None:
    """Prints which strategies train what no client has room for."""
    if multihost.is_leader():
        for plan in wave.plans:
            for note in note_room(plan):
                tell_once(note)


@functools.cache
def tell_once(note: str) -> None:
    """Prints a line that this process has not printed yet."""
    print(note, file=sys.stderr, flush=True)


def build_job(
    wave: Wave, folders: Sequence[Path | None], *, drives: bool = False
) -> Job:
    """Puts a wave on its devices, ready for the loop.

    Args:
      wave: the runs.
      folders: see `Job.folders`.
      drives: whether the rounds are going to run, so that they compile from now on.
    """
    start = time.monotonic()
    mesh, program = wave.program.mesh, wave.program
    hypers = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(p.hyper for p in wave.plans)
    )
    hypers = place(hypers, mesh, P(RUNS))
    seeds = np.array([plan.config.seed for plan in wave.plans])
    init, programs = build_programs(program)
    federation = stack_federations([p.federation for p in wave.plans], mesh)
    federation = federation.replace(base=place_base(program))
    first = place(seeds, mesh, P(RUNS)), federation, hypers
    if drives:
        state, frozen = shape_state(init, first, mesh)
        functions = programs.run_rounds, programs.evaluate
        compile_ahead(functions, state, federation.replace(frozen=frozen), hypers)
    (init_runs,), _ = compile_once([init], *first)
    state, frozen = init_runs(*first)
    return Job(
        names=wave.names,
        folders=folders,
        state=state,
        inputs=(federation.replace(frozen=frozen), hypers),
        frozen=program.strategy.frozen,
        programs=programs,
        split=split_runs,
        compile_seconds=time.monotonic() - start,
    )


def shape_state(init: Callable, first: tuple[PyTree, ...], mesh: Mesh) -> PyTree:
    """Shapes and shardings of the first state and of what is frozen."""
    sharding = NamedSharding(mesh, P(RUNS))
    place_leaf = lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
    )
    return jax.tree.map(place_leaf, jax.eval_shape(init, *first))


def place_base(program: Program) -> PyTree:
    """Pretrained weights on the devices, as `Federation.base` has them."""
    base = program.model.base
    return {} if base is None else {BASE: place(base.load(), program.mesh, P())}


def stack_federations(federations: list[Federation], mesh: Mesh) -> Federation:
    """One federation for all runs, on the devices: `PER_RUN` fields have an S axis.

    Lists of examples get the length of the longest; no draw depends on it.
    """
    own = {
        name: jax.tree.map(
            stack_lists if name in LISTS else lambda *leaves: np.stack(leaves),
            *(getattr(f, name) for f in federations),
        )
        for name in PER_RUN
    }
    return Federation(
        **{
            name: place(
                own.get(name, getattr(federations[0], name)),
                mesh,
                getattr(FEDERATION_SPEC, name),
            )
            for name in Federation.__dataclass_fields__
        }
    )


def stack_lists(*lists: np.ndarray) -> np.ndarray:
    """Stacks arrays [..., M], those that are shorter with zeros at their end."""
    longest = max(each.shape[-1] for each in lists)
    widths = lambda each: [*[(0, 0)] * (each.ndim - 1), (0, longest - each.shape[-1])]
    return np.stack([np.pad(each, widths(each)) for each in lists])


@functools.lru_cache(PROGRAMS_KEPT)  # jitted functions hold what was compiled of them
def build_programs(program: Program) -> tuple[Callable, Programs]:
    """Jitted init, and what the loop runs, for runs that share a program.

    All have a leading S axis on state, hyperparameters, the federation's `PER_RUN`
    fields and their results.
    """
    runs, mesh = P(RUNS), program.mesh

    def init_run(
        seed: Array, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, PyTree]:
        return init_state(jax.random.key(seed), hyper, program)

    def stage(number: int) -> Callable:
        return functools.partial(run_stage, program=program, number=number)

    divided = (runs, FEDERATION_SPEC, runs)
    over_runs = lambda function: spread(
        map_runs(function, program.platform), mesh, divided, runs
    )
    strategy = program.strategy
    stages = strategy.stages
    acts = [act for _, act in stages]  # one that acts again is compiled once
    compiled = {act: jax.jit(over_runs(stage(acts.index(act)))) for act in acts}
    finetune = None
    # The owner of pooled data has no clients' examples to tune on.
    if program.static.evaluation.finetune and not strategy.pooled:
        share = map_runs(build_finetune_share(program), program.platform)
        finetune = jax.jit(spread(share, mesh, (*divided, runs), runs))
    expose = None
    if program.static.privacy.observe and not strategy.pooled and not strategy.silent:
        expose = jax.jit(over_runs(build_expose_share(program)))
    return jax.jit(over_runs(init_run)), Programs(
        run_rounds=jax.jit(over_runs(scan_rounds(program)), donate_argnums=0),
        evaluate=jax.jit(over_runs(build_evaluate_share(program))),
        finetune=finetune,
        stages=tuple((when, compiled[act]) for when, act in stages),
        expose=expose,
    )


def split_runs(tree: PyTree) -> list[PyTree]:
    """A pytree of arrays with a leading S axis as S pytrees."""
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def summarise_owners(config: ConfigDict, partition: Partition) -> dict[str, float]:
    """`owners_per_example`, the mean over owned examples, where there is an overlap."""
    if not config.partition.overlap:
        return {}
    places = np.arange(partition.index.shape[1]) < partition.size[:, None]
    owned = len(np.unique(partition.index[places]))
    return {"owners_per_example": float(partition.size.sum() / owned)}


def summarise_tokens(data: Data) -> dict[str, float]:
    """`bytes_per_token` of the test text, where tokens are not one byte each."""
    if data.task != "text" or "bytes" not in data.test:
        return {}
    sizes, length = data.test["bytes"][:, 1:], data.test["length"]
    return {"bytes_per_token": float(sizes.sum() / (length - 1).sum())}


def summarise_limit(data: Data) -> dict[str, float]:
    """`limit_bits` of the test text, where it is known."""
    return {} if data.limit is None else {"limit_bits": float(data.limit)}


def finish(
    plan: Plan,
    workdir: Path,
    state: tuple[AlignState, Belief, Participation],
    results: dict[str, np.ndarray],
    spent: Row,
) -> dict[str, Any]:
    """Writes and seals the files of a finished run; returns its summary."""
    save_arrays(workdir / "final.npz", plan, *state, results)
    config, rows = plan.config, read_metrics(workdir / "metrics.jsonl")
    strategy = find_strategy(config.strategy)
    summary = {
        "strategy": config.strategy,
        "seed": config.seed,
        "note": strategy.about,
        "needs": strategy.needs,
        "reference": strategy.reference,
        "reads": find_reads(config, plan.program),
        "overwrites": find_overwritten(config),
        "idle": sorted(set().union(*list_idle_fields(config))),
        **summarise_owners(config, plan.partition),
        **summarise_tokens(plan.data),
        **summarise_limit(plan.data),
        **account(config, plan.program),
        **make_summary(rows, spent, MEASURES, config.evaluation.targets),
        **summarise_origins(workdir),
        "measures": pack_measures(MEASURES),
    }
    write_json(workdir / "summary.json", summary)
    seal(workdir)
    return summary


def drop_single(rows: np.ndarray | Array) -> np.ndarray | Array:
    """[N, G, E] as it is, or [N, E] where the model has one MoE layer."""
    return rows[:, 0] if rows.shape[1] == 1 else rows


def save_arrays(
    path: Path,
    plan: Plan,
    align: AlignState,
    belief: Belief,
    participation: Participation,
    results: dict[str, np.ndarray],
) -> None:
    """Writes `final.npz`, the arrays that the report draws.

    `results` are those of the last evaluation: `specialisation` [G, E, L],
    `client_accuracy` [N] and, of some tasks, `client_bits` [N], which are NaN in the
    file for a client without examples and, where parts are personal, for one that has
    none yet.
    """
    label_counts = plan.partition.label_counts
    specialisation, num_examples = results["specialisation"], label_counts.sum(axis=1)
    served = num_examples > 0
    if plan.program.strategy.personal:
        served &= participation.rounds > 0
    several, groups = len(specialisation) > 1, plan.data.group_names
    write_arrays(
        path,
        fitness=drop_single(align.fitness),
        times_held=drop_single(align.times_held),
        capacity=np.minimum(participation.capacity, plan.program.sizes.max_capacity),
        belief=belief.capacity,
        tier=plan.federation.devices.tier,
        tier_names=np.array(plan.tier_names),
        participation=participation.rounds,
        last_client=participation.client,
        last_code=participation.outcome.code,
        last_phases=participation.outcome.phases,
        last_spent=participation.outcome.spent,
        label_counts=label_counts,
        num_examples=num_examples,
        **{
            name: np.where(served, results[name], np.nan)
            for name in ("client_accuracy", "client_bits")
            if name in results
        },
        specialisation=specialisation if several else specialisation[0],
        label_names=np.array(plan.data.stratum_names),
        **({"group_names": np.array(groups)} if groups else {}),
    )
