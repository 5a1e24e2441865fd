"""Run folders and their numbers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from fedmoe_jax.config import flatten
from fedmoe_jax.files import read_json
from fedmoe_jax.metrics import ACCURACIES, own_final, read_metrics
from fedmoe_jax.types import UserError

NAN = float("nan")
# Config fields that do not change what a run computes, or that number its repetition.
INCIDENTAL = ("seed", "run.", "checkpoint.", "data.dir", "chunk_rounds")


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


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """Writes varied fields into the labels, so that only repetitions share one."""
    varied = {label: varied_fields(group) for label, group in group_runs(runs).items()}
    named = []
    for run in runs:
        flat = flatten(run.config)
        parts = [run.label, *(f"{field}={flat[field]}" for field in varied[run.label])]
        named.append(run._replace(label=" ".join(parts)))
    return named


def num_experts(run: Run) -> int:
    """Experts of the trained model, 0 before the first round."""
    return len(run.rows[0].get("expert_load", ())) if run.rows else 0


def numbers(run: Run) -> dict[str, float]:
    """Flat numbers of a run; NaN where unknown, infinity for a target not reached.

    A run in progress has no summary: its final numbers are those of the rounds so far.
    How even the load is says nothing about a model with one expert, so it is NaN there.
    """
    done = max(len(run.rows), 1)
    finals = {name: own_final(run.rows, name) for name in ACCURACIES}
    found = {f"final_{k}": NAN if v is None else v for k, v in finals.items()}
    for name in ("load_cv", "load_entropy"):
        found[f"mean_{name}"] = _mean_of(run, name)
    for name in ("bytes_up", "bytes_down", "client_flops"):
        found[f"total_{name}"] = done * _mean_of(run, name)
    for name, value in flatten(run.summary).items():
        if isinstance(value, int | float | None):
            missing = math.inf if name.startswith("rounds_to") else NAN
            found[name] = missing if value is None else float(value)
    for name in ("late_clients", "simulated_seconds"):
        found[f"mean_{name}"] = _mean_of(run, name)
    for way in ("up", "down"):
        found[f"megabytes_{way}"] = found[f"total_bytes_{way}"] / done / 1e6
    found["peak_client_parameters"] = max(
        (row.get("peak_client_parameters", NAN) for row in run.rows), default=NAN
    )
    found["gigaflops"] = found["total_client_flops"] / done / 1e9
    if num_experts(run) == 1:
        found |= {"mean_load_cv": NAN, "mean_load_entropy": NAN, "starved_experts": NAN}
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
