"""Stored studies: `results/NAME/runs.csv`, with the rows that its `table.md` names."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import UserError
from fedmoe_jax.report.paired import Seeds, pair_up

UNTUNED = "untuned"  # also of tables that are older than tuning
ATTACKS = "attacks.csv"


class Study(NamedTuple):
    """The numbers of a study.

    Attributes:
      name: its folder's.
      seeds: numbers of the runs by label, a row of `table.md`, and seed.
      rates: "tuned", "untuned" or "tuned in part", by label.
      places: label and seed by the folder of the run.
      evaluations: rows of `evaluations.csv`; none without such a file.
    """

    name: str
    seeds: Mapping[str, Seeds]
    rates: Mapping[str, str]
    places: Mapping[str, tuple[str, int]]
    evaluations: Sequence[Mapping[str, str]]


def read_rates(text: str) -> dict[str, str]:
    """The labels of the first table of a `table.md`, and whether each is tuned."""
    lines = text.lstrip().split("\n\n")[0].strip().splitlines()
    bare = [line.removeprefix("| ").removesuffix(" |") for line in lines]
    heads, _, *rows = [line.split(" | ") for line in bare]
    place = heads.index("Rates") if "Rates" in heads else None
    labels = [row[0].strip("`") for row in rows]
    rates = [UNTUNED if place is None else row[place] for row in rows]
    return dict(zip(labels, rates, strict=True))


def find_label(record: Mapping[str, str], labels: Iterable[str]) -> str | None:
    """The label of a row of `runs.csv`; None where the table has none.

    A label is the strategy and, of the changed fields, those with unusual values: the
    longest of which all fields have the row's values.
    """

    def fits(label: str) -> bool:
        rest = f"{label} "
        for field, value in record.items():
            rest = rest.replace(f" {field}={value} ", " ")
        return rest == f"{record['strategy']} "

    return max(filter(fits, labels), key=len, default=None)


def read_numbers(record: Mapping[str, str]) -> dict[str, float]:
    """The numbers of a row; a target that is not reached is infinite."""
    known = {}
    for name, text in record.items():
        never = math.inf if name.startswith("rounds_to") else math.nan
        try:
            known[name] = float(text) if text else never
        except ValueError:  # a name, a commit
            continue
    return known


def read_study(folder: Path) -> Study:
    """Reads a stored study, with what attacks found in its runs where that is stored.

    Raises:
      UserError: a file is missing, a run has no row in the table, or attacks are on a
        run that is not there.
    """
    for name in ("table.md", "runs.csv"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; allowed: a stored study")
    rates, seeds, places = read_rates((folder / "table.md").read_text()), {}, {}
    for record in read_csv(folder / "runs.csv"):
        label = find_label(record, rates)
        if label is None:
            raise UserError(
                f"{folder}/runs.csv: {record['folder']} has no row in table.md; "
                "allowed: the table of the same runs"
            )
        seed = int(record["seed"])
        seeds.setdefault(label, {}).setdefault(seed, read_numbers(record))
        places[record["folder"]] = label, seed
    for record in read_csv(folder / ATTACKS) if (folder / ATTACKS).is_file() else []:
        if record["folder"] not in places:
            raise UserError(
                f"{folder}/{ATTACKS}: {record['folder']} is no run of runs.csv; "
                "allowed: attacks on the same runs"
            )
        label, seed = places[record["folder"]]
        known = seeds[label][seed]
        seeds[label][seed] = {**read_numbers(record), **known}
    path = folder / "evaluations.csv"
    evaluations = read_csv(path) if path.is_file() else []
    return Study(folder.name, seeds, rates, places, evaluations)


def add_change(study: Study, change: str) -> Study:
    """The study with a change in all its labels, which its own table leaves out.

    Args:
      study: all of whose runs have the change.
      change: `field=value`, which comes last in a label; empty leaves them as they are.
    """
    whole = lambda label: f"{label} {change}".strip()
    return study._replace(
        seeds={whole(label): of for label, of in study.seeds.items()},
        rates={whole(label): rate for label, rate in study.rates.items()},
        places={at: (whole(label), seed) for at, (label, seed) in study.places.items()},
    )


def join_studies(name: str, parts: Sequence[Study]) -> Study:
    """One study of the rows of several, whose runs differ in nothing else.

    A row that several have has the seeds of all.

    Raises:
      UserError: two have the same seed of a row, or other rates for it.
    """
    seeds: dict[str, dict[int, Mapping[str, float]]] = {}
    rates: dict[str, str] = {}
    for part in parts:
        for label, of in part.seeds.items():
            known = seeds.setdefault(label, {})
            for seed in known.keys() & of.keys():
                raise UserError(
                    f"claims: seed {seed} of {label} is in several parts of {name}; "
                    "allowed: one"
                )
            known.update(of)
            if rates.setdefault(label, part.rates[label]) != part.rates[label]:
                raise UserError(
                    f"claims: {label} is tuned and untuned in parts of {name}; "
                    "allowed: alike"
                )
    # Runs of several studies may have folders of the same name.
    places = {
        f"{part.name}/{folder}": place
        for part in parts
        for folder, place in part.places.items()
    }
    evaluations = [
        {**row, "run": f"{part.name}/{row['run']}"}
        for part in parts
        for row in part.evaluations
    ]
    return Study(name, seeds, rates, places, evaluations)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its columns."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def take_window(study: Study, key: str, first: int, last: int) -> dict[str, Seeds]:
    """The mean of a measure over the evaluations of some rounds, by label and seed.

    Args:
      study: with evaluations.
      key: of a final measure; its field is a column of `evaluations.csv`.
      first: of these rounds, counted from 1.
      last: of these rounds, which counts, too.

    Raises:
      UserError: no evaluation of the field is stored for these rounds.
    """
    field, found = MEASURES[key].field, {}
    for row in study.evaluations:
        if first <= int(row["round"]) <= last and row.get(field):
            found.setdefault(study.places[row["run"]], []).append(float(row[field]))
    if not found:
        raise UserError(
            f"results/{study.name}/evaluations.csv has no {field} in rounds {first} to "
            f"{last}; allowed: rounds and measures that are stored"
        )
    seeds: dict[str, dict[int, dict[str, float]]] = {}
    for (label, seed), values in found.items():
        seeds.setdefault(label, {})[seed] = {key: sum(values) / len(values)}
    return {label: each for label, each in seeds.items()}


def find_disagreements(study: Study, rows: Iterable[Mapping[str, str]]) -> list[str]:
    """The rows of a `paired.csv` that its runs do not give, a line each."""
    faults = []
    for row in rows:
        label, other, key = row["strategy"], row["baseline"], row["measure"]
        if key not in MEASURES:  # of a plug-in
            continue
        ours, others = study.seeds.get(label, {}), study.seeds.get(other, {})
        mean = pair_up(ours, others, key, MEASURES[key]).mean
        stored = float(row["difference"] or "nan")
        if not np.isclose(mean, stored, atol=1e-5, equal_nan=True):
            faults.append(
                f"results/{study.name}/paired.csv: {label} less {other}, {key}, is "
                f"{stored:g}, runs.csv gives {mean:g}"
            )
    return faults
