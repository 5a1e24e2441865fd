"""Run folders and their numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import own_final, read_metrics
from fedmoe_jax.report.summary import BUDGETS, measure_costs
from fedmoe_jax.runtime.files import flatten, read_json
from fedmoe_jax.train.writers import ACCURACIES

NAN = float("nan")
# Config fields that do not change what a run computes, or that number its repetition.
INCIDENTAL = ("seed", "run.", "checkpoint.", "data.dir", "chunk_rounds")
# Begin the names of what is infinite where a target was not reached.
TO_TARGETS = ("rounds_to", *BUDGETS)
# Numbers that say nothing about a model with one expert.
OF_EXPERTS = (
    "mean_load_cv",
    "mean_load_entropy",
    "starved_experts",
    "mean_capacity_violations",
    "mean_capacity_error",
)
# Numbers that say nothing about a run that simulates no device.
OF_DEVICES = (
    "mean_late_clients",
    "mean_lost_clients",
    "mean_stale_clients",
    "final_participation_jain",
    "simulated_minutes",
    "kilojoules",
)


class Run(NamedTuple):
    """What one run folder holds.

    Attributes:
      config: the nested dict of `config.json`.
      rows: the objects of `metrics.jsonl`, one per round.
      summary: the dict of `summary.json`; empty while the run is in progress.
      arrays: the arrays of `final.npz`; empty while the run is in progress.
      folder: where it was read from.
      label: the strategy; runs of one label are repetitions of one another.
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path
    label: str


def load_run(folder: str | Path) -> Run:
    """Reads a finished or running run; a half-written last row is left out.

    Raises:
      UserError: the folder holds no `config.json`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"report: {folder} is no run folder: it has no config.json")
    config = read_json(folder / "config.json")
    summary, arrays = folder / "summary.json", {}
    if (folder / "final.npz").is_file():
        with np.load(folder / "final.npz") as stored:
            arrays = dict(stored)
    return Run(
        config=config,
        rows=read_metrics(folder / "metrics.jsonl"),
        summary=read_json(summary) if summary.is_file() else {},
        arrays=arrays,
        folder=folder,
        label=config["strategy"],
    )


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label, in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def varied_fields(runs: Sequence[Run]) -> list[str]:
    """Config fields in which runs of one label differ, other than `INCIDENTAL` ones."""
    varied = {}
    for group in group_runs(runs).values():
        configs = [flatten(run.config) for run in group]
        for field in configs[0]:
            values = {str(config.get(field)) for config in configs}
            if len(values) > 1 and not field.startswith(INCIDENTAL):
                varied[field] = None
    return list(varied)


def usual_values(runs: Sequence[Run], fields: Sequence[str]) -> dict[str, Any]:
    """The value of each field that most of the configs of some runs have, if one is."""
    configs = [flatten(run.config) for run in runs]
    distinct = {tuple(str(config[field]) for field in fields) for config in configs}
    usual = {}
    for place, field in enumerate(fields):
        value, count = Counter(each[place] for each in distinct).most_common(1)[0]
        if 2 * count > len(distinct):
            usual[field] = value
    return usual


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """Writes varied fields into the labels, so that only repetitions share one.

    A value that most configs of a strategy share is left out.
    """
    told = {}
    for label, group in group_runs(runs).items():
        varied = varied_fields(group)
        told[label] = varied, usual_values(group, varied)
    named = []
    for run in runs:
        (varied, usual), flat = told[run.label], flatten(run.config)
        changes = [
            f"{field}={flat[field]}"
            for field in varied
            if str(flat[field]) != usual.get(field)
        ]
        named.append(run._replace(label=" ".join([run.label, *changes])))
    return named


def num_experts(run: Run) -> int:
    """Experts of the trained model, 0 before the first round."""
    return len(run.rows[0].get("expert_load", ())) if run.rows else 0


def varies(run: Run, name: str) -> bool:
    """Whether a field of the rows has more than one value."""
    return len({row[name] for row in run.rows if row.get(name) is not None}) > 1


def numbers(run: Run) -> dict[str, float]:
    """Flat numbers of a run; NaN where unknown, infinity for a target not reached.

    A run in progress has no summary: its final numbers are those of the rounds so far.
    With one expert the numbers `OF_EXPERTS` are NaN, without devices `OF_DEVICES`.
    """
    done = max(len(run.rows), 1)
    finals = {name: own_final(run.rows, name) for name in ACCURACIES}
    found = {f"final_{k}": NAN if v is None else v for k, v in finals.items()}
    for name in ("load_cv", "load_entropy"):
        found[f"mean_{name}"] = _mean_of(run, name)
    found |= measure_costs(run.rows) if run.rows else {}
    for name, value in flatten(run.summary).items():
        if isinstance(value, int | float | None):
            missing = math.inf if name.startswith(TO_TARGETS) else NAN
            found[name] = missing if value is None else float(value)
    for name in ("late_clients", "simulated_seconds"):
        found[f"mean_{name}"] = _mean_of(run, name)
    units = {
        "megabytes_up": ("total_bytes_up", done * 1e6),
        "megabytes_down": ("total_bytes_down", done * 1e6),
        "gigaflops": ("total_client_flops", done * 1e9),
        "simulated_minutes": ("total_simulated_seconds", 60.0),
        "kilojoules": ("total_joules", 1e3),
    }
    for name, (total, unit) in units.items():
        found[name] = found.get(total, NAN) / unit
    found["peak_client_parameters"] = max(
        (row.get("peak_client_parameters", NAN) for row in run.rows), default=NAN
    )
    if found.get("total_simulated_seconds") == 0:
        found |= dict.fromkeys(OF_DEVICES, NAN)
    if num_experts(run) == 1:
        found |= dict.fromkeys(OF_EXPERTS, NAN)
    return found


def _mean_of(run: Run, name: str) -> float:
    """Mean over the rows that have the field; a None in it is a NaN."""
    values = np.array([row[name] for row in run.rows if name in row], float)
    return float(values.mean()) if len(values) else NAN


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval.

    Needs at least one value; the half-width is NaN for a single one.
    """
    if len(values) == 1:
        return float(values[0]), NAN
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1)) * error
