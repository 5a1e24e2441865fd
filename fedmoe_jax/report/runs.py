"""Run folders and their numbers."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from fedmoe_jax.measures import MEASURES, PERPLEXITY, unpack_measures
from fedmoe_jax.options import DEVICES, EXPERTS, Measure, UserError
from fedmoe_jax.report import forms
from fedmoe_jax.report.rows import is_number, measured, read_metrics, stack_experts
from fedmoe_jax.report.summary import measure_run, reach_targets
from fedmoe_jax.runtime.files import flatten, read_arrays, read_json
from fedmoe_jax.runtime.seals import METRICS, ORIGINS, find_broken

NAN = float("nan")
# Config fields that do not change what a run computes, or that number its repetition.
INCIDENTAL = (
    "seed",
    "run.",
    "checkpoint.",
    "data.dir",
    "chunk_rounds",
    "evaluation.targets",
    "evaluation.baseline",
)
ORDERS = ("run.client_chunk", "run.num_devices")  # they change the order of sums alone
OWN_ROUNDS = "rounds_to_95_percent_of_final"
LEARNT = 0.15  # of the way from chance to 1, on ten classes 23.5 %
ABSENT = "absent"  # in place of the value where a run has no such field
# Parts of a summary that are no numbers of the run.
RECORDS = ("measures", "made_by", "origins")


class Run(NamedTuple):
    """The files of one run folder.

    Attributes:
      config: the nested dict of `config.json`.
      rows: the objects of `metrics.jsonl`, one per round.
      summary: the dict of `summary.json`; empty while the run is in progress.
      arrays: the arrays of `final.npz`; empty while the run is in progress.
      folder: from which it was read.
      label: the strategy; runs of one label are repetitions of one another.
      measures: by the keys of its numbers; the package's where the run is in progress
        or older than its summary's `measures`.
      origins: the processes that computed it, as `origins.json` or the summary lists
        them; empty where none is known.
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path
    label: str
    measures: Mapping[str, Measure]
    origins: Sequence[Mapping[str, Any]] = ()


def load_run(folder: str | Path) -> Run:
    """Reads a finished or running run; a half-written last row is left out.

    Raises:
      UserError: the folder holds no `config.json` of a run, or a file is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"report: {folder} has no config.json; allowed: the folder of a run"
        )
    config = read_json(folder / "config.json")
    forms.check_fields(config, forms.CONFIG, folder / "config.json")
    path, summary, arrays = folder / "summary.json", {}, {}
    if path.is_file():
        check_sealed(folder)
        summary = read_json(path)
        forms.check_fields(summary, forms.SUMMARY, path)
    if (folder / "final.npz").is_file():
        arrays = read_arrays(folder / "final.npz")
        forms.check_arrays(arrays, folder / "final.npz")
        forms.check_codes(arrays, config, folder / "final.npz")
    rows = read_metrics(folder / METRICS)
    forms.check_rows(rows, folder / METRICS)
    return Run(
        config=config,
        rows=rows,
        summary=summary,
        arrays=arrays,
        folder=folder,
        label=config["strategy"],
        measures=unpack_measures(summary["measures"], path)
        if "measures" in summary
        else MEASURES,
        origins=read_origins(folder, summary),
    )


def read_origins(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What computed a run, that of a run in progress from its own file, if it can."""
    if "origins" in summary:
        return summary["origins"]
    if "made_by" in summary:
        return [{"first_round": 1, "made_by": summary["made_by"]}]
    try:
        return read_json(folder / ORIGINS)["origins"]
    except (OSError, UserError, KeyError, TypeError):  # none, or it is damaged
        return []


def check_sealed(folder: Path) -> None:
    """Checks that the files of a finished run are as it wrote them.

    Raises:
      UserError: one is not.
    """
    for name in find_broken(folder):
        raise UserError(
            f"{folder / name} is not as the run has written it; allowed: that file "
            "restored, or the run's command given again"
        )


def join_measures(runs: Iterable[Run]) -> dict[str, Measure]:
    """The measures of all runs, in the order of first appearance."""
    joined: dict[str, Measure] = {}
    for run in runs:
        for key, measure in run.measures.items():
            joined.setdefault(key, measure)
    return joined


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label, in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def is_idle(run: Run, field: str) -> bool:
    """Whether a run does not read a field, or has it from no version."""
    return field in run.summary.get("idle", ()) or field not in flatten(run.config)


def varied_fields(runs: Sequence[Run]) -> list[str]:
    """Config fields in which runs of one label differ.

    Without fields that none of them reads, and without `INCIDENTAL` ones; but with
    `ORDERS` where a seed would be there twice: its sums in another order are no second
    seed.
    """
    varied = {}
    for group in group_runs(runs).values():
        configs = [flatten(run.config) for run in group]
        values = {
            field: [str(config.get(field, ABSENT)) for config in configs]
            for field in dict.fromkeys(field for config in configs for field in config)
            if not all(is_idle(run, field) for run in group)
        }
        apart = [field for field, each in values.items() if len(set(each)) > 1]
        fields = [field for field in apart if not field.startswith(INCIDENTAL)]
        seeds = [str(config.get("seed", ABSENT)) for config in configs]
        runs_apart = set(zip(seeds, *(values[field] for field in fields), strict=True))
        if len(runs_apart) < len(group):
            fields += [field for field in apart if field in ORDERS]
        varied |= dict.fromkeys(fields)
    return list(varied)


def values_of(run: Run, fields: Sequence[str]) -> tuple[str, ...]:
    """The texts of the values of some config fields."""
    flat = flatten(run.config)
    return tuple(str(flat.get(field, ABSENT)) for field in fields)


def usual_values(
    values: Collection[Sequence[str]], fields: Sequence[str]
) -> dict[str, str]:
    """The value of each field that more than half of some configs have, if one is.

    Args:
      values: of these fields, by config.
      fields: their names.
    """
    usual = {}
    for field, each in zip(fields, zip(*values, strict=True), strict=True):
        value, count = Counter(each).most_common(1)[0]
        if 2 * count > len(values):
            usual[field] = value
    return usual


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """Writes varied fields into the labels, so that only repetitions share one.

    Left out is the value that most rows of the report have.
    """
    varied = {label: varied_fields(group) for label, group in group_runs(runs).items()}
    fields = list(dict.fromkeys(field for each in varied.values() for field in each))
    rows = {(run.label, values_of(run, fields)) for run in runs}
    usual = usual_values([values for _, values in rows], fields)
    named = []
    for run in runs:
        values = values_of(run, varied[run.label])
        changes = [
            f"{field}={value}"
            for field, value in zip(varied[run.label], values, strict=True)
            if value != usual.get(field)
        ]
        named.append(run._replace(label=" ".join([run.label, *changes])))
    return named


def name_folders(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders; their paths where two have the same name."""
    names = [run.folder.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return names


def num_experts(run: Run) -> int:
    """Experts of a layer of the trained model, 0 before the first round."""
    return stack_experts(run.rows[:1], "expert_load").shape[-1]


def varies(run: Run, measure: Measure) -> bool:
    """True where a measure has several values over the rounds of a run."""
    return len({value for _, value in measured(run.rows, *measure.fields)}) > 1


def chance_of(run: Run) -> float | None:
    """Accuracy of guessing among the classes, in (0, 1].

    None before the run's end, and of text, whose strata are not what is predicted.
    """
    if not run.arrays or "client_bits" in run.arrays:
        return None
    return count_groups(run) / len(run.arrays["label_names"])


def limit_of(runs: Iterable[Run]) -> float | None:
    """Bits below which no model comes on the test text, but for chance.

    None where they are unknown, as before a run's end, or not the same of all runs.
    """
    known = {run.summary.get("limit_bits") for run in runs if run.summary}
    return known.pop() if len(known) == 1 else None


def count_groups(run: Run) -> int:
    """Groups of clients in a finished run, each with strata of its own; 1 for none."""
    return len(run.arrays.get("group_names", ("",)))


def has_learnt(run: Run, final: float) -> bool:
    """Whether an accuracy is far enough above chance; True where that is unknown."""
    chance = chance_of(run)
    return chance is None or final >= chance + LEARNT * (1 - chance)


def absent_kinds(run: Run, known: Mapping[str, float]) -> set[str]:
    """What a run has not, `EXPERTS` to choose from or simulated `DEVICES`.

    Args:
      run: finished or in progress.
      known: its numbers.
    """
    absent = {DEVICES} if known.get("total_simulated_seconds") == 0 else set()
    return absent | {EXPERTS} if num_experts(run) == 1 else absent


def token_perplexity(run: Run, known: Mapping[str, float]) -> float:
    """The perplexity of a token with all experts; NaN without bits of a finished run.

    2 to the power of `final_global_bits`, which are of a byte, times `bytes_per_token`,
    which only a summary says: without it a token is a byte. Infinity beyond float64.

    Args:
      run: finished or in progress.
      known: its other numbers.
    """
    bits = known.get("final_global_bits", NAN) if run.summary else NAN
    with np.errstate(over="ignore"):
        return float(np.exp2(bits * known.get("bytes_per_token", 1.0)))


def numbers(
    run: Run, measures: Mapping[str, Measure], targets: Mapping[str, float]
) -> dict[str, float]:
    """Flat numbers of a run; NaN where unknown, infinity for a target not reached.

    A number that the summary does not have is that of the rounds so far; those of
    targets are always of the rows, see `reach_targets`. NaN, too, are measures of
    `absent_kinds`. A run that has not learnt never reaches its own final accuracy.

    Args:
      run: finished or in progress.
      measures: of all runs that it is compared with.
      targets: likewise, global accuracies in (0, 1] by name.
    """
    reached = reach_targets(run.rows, targets, measures)
    left_out = {*RECORDS, *reached}
    summary = {k: v for k, v in run.summary.items() if k not in left_out}
    missing = {key: m for key, m in measures.items() if key not in summary}
    found = measure_run(run.rows, missing) | flatten(summary | reached)
    to_targets = ("rounds_to", *(f"{name}." for name in reached))
    known = {}
    for name, value in found.items():
        if value is None:
            known[name] = math.inf if name.startswith(to_targets) else NAN
        elif is_number(value):
            known[name] = float(value)
    final = known.get("final_global_accuracy", NAN)
    if OWN_ROUNDS in known and not (math.isnan(final) or has_learnt(run, final)):
        known[OWN_ROUNDS] = math.inf
    if not math.isnan(perplexity := token_perplexity(run, known)):
        known[PERPLEXITY] = perplexity
    absent = absent_kinds(run, known)
    return known | {k: NAN for k, m in measures.items() if m.over and m.of in absent}


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval.

    Needs at least one value; the half-width is NaN for a single one.
    """
    if len(values) == 1:
        return float(values[0]), NAN
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(stdtrit(len(values) - 1, 0.975)) * error
