"""Classes, languages or whatever else the split skews, one by one.

`strata.csv` has the numbers of every one, and a picture compares strategies in each.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedmoe_jax.measures import STRATA
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.plots import strata_map
from fedmoe_jax.report.records import write_records
from fedmoe_jax.report.rows import Row, final_values
from fedmoe_jax.report.runs import Run

VALUES = ("accuracy", "bits")
MOST = 40  # strata of a picture
CAPTIONS = {
    "global": "the model with all experts",
    "personal": "clients' own experts, the mean over clients by the share of it among "
    "their own examples",
    "finetuned": "clients' own experts after one more local round, of those that hold "
    "any",
}


def find_columns(runs: Sequence[Run]) -> dict[str, str]:
    """The fields that any of the runs has, by the columns of `strata.csv`."""
    named = {
        f"{kind}_{value}": f"{field}_{value}"
        for kind, field in STRATA.items()
        for value in VALUES
    }
    known = {name for run in runs for row in run.rows for name in row}
    return {column: field for column, field in named.items() if field in known}


def final_strata(rows: Sequence[Row], field: str) -> np.ndarray | None:
    """The final value of every stratum, [L], see `final_values`; None without one."""
    points = [(r["round"], np.array(r[field], float)) for r in rows if r.get(field)]
    return mean_known(final_values(points)) if points else None


def mean_known(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The mean [L] of the numbers of several rows [L], NaN where none has one."""
    seen = np.isfinite(rows)
    total, count = np.where(seen, rows, 0.0).sum(axis=0), seen.sum(axis=0)
    return np.where(count, total / np.maximum(count, 1), np.nan)


def list_strata(run: Run, columns: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A record for every stratum of a finished run; empty where a number is unknown."""
    if not run.arrays:
        return
    names, examples = run.arrays["label_names"], run.arrays["label_counts"].sum(axis=0)

    def show(field: str) -> list[str]:
        values = final_strata(run.rows, field)
        if values is None or len(values) != len(names):
            return [""] * len(names)
        return [f"{value:.6g}" if np.isfinite(value) else "" for value in values]

    found = {column: show(field) for column, field in columns.items()}
    for place, name in enumerate(names):
        record = {"stratum": str(name), "num_examples": str(examples[place])}
        yield record | {column: texts[place] for column, texts in found.items()}


def write_strata_csv(path: str | Path, runs: Sequence[Run]) -> None:
    """One row per run and stratum with its numbers, see `write_records`."""
    columns = find_columns(runs)
    fields = ["stratum", "num_examples", *columns]
    write_records(path, runs, fields, lambda run: list_strata(run, columns))


def mean_strata(
    groups: Mapping[str, Sequence[Run]], field: str, count: int
) -> dict[str, np.ndarray]:
    """The mean over the seeds of each label that has the field of `count` strata."""
    found = {}
    for label, group in groups.items():
        each = [final_strata(run.rows, field) for run in group]
        rows = [row for row in each if row is not None and len(row) == count]
        if rows:
            found[label] = mean_known(rows)
    return found


def strata_pictures(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """A map of strategies and strata for each kind of number; none of many strata."""
    runs = [run for group in groups.values() for run in group if run.arrays]
    names = list(dict.fromkeys(tuple(run.arrays["label_names"]) for run in runs))
    if len(names) != 1 or not 1 < len(names[0]) <= MOST:
        return
    bits = "global_bits" in find_columns(runs)
    for kind, field in STRATA.items():
        found = mean_strata(groups, f"{field}_{VALUES[bits]}", len(names[0]))
        if not np.isfinite(list(found.values())).any():
            continue
        rows = np.stack(list(found.values()))
        title = "Bits of a byte" if bits else "Accuracy (%)"
        caption = (
            f"In each class or group, {CAPTIONS[kind]}; means over "
            "seeds. A column that is bad in every row is hard; a row with a few bad "
            "columns serves some at the expense of others."
        )
        drawn = strata_map(
            list(found), names[0], rows if bits else 100 * rows, title, bits
        )
        yield Picture(f"{kind}_strata", caption, drawn)
