"""Recomputes every claim of `results/claims.toml`: `python -m benchmarks.claims`.

It rewrites the numbers between the markers of the pages that quote claims;
`--check` writes nothing and fails where a page has another number.
"""

import argparse
import math
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import claims_page
from benchmarks.page import RESULTS
from benchmarks.studies import (
    Study,
    find_disagreements,
    read_csv,
    read_study,
    take_window,
)
from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import Measure, UserError
from fedmoe_jax.report.cells import Cell, mark_best, mean_cell, median_cell
from fedmoe_jax.report.diverged import KEY as DIVERGED
from fedmoe_jax.report.paired import Paired, Seeds, difference_cell, pair_up
from fedmoe_jax.report.runs import NAN
from fedmoe_jax.runtime.files import write_atomically

LIST = RESULTS / "claims.toml"
PAGES = ("results/README.md", "README.md", "docs/results.md")
TARGET = "rounds_to."  # measures whose numbers are rounds, maybe never


class Claim(NamedTuple):
    """One claim, as the list has it; `results/claims.toml` says how it is written.

    Attributes:
      id: by which pages quote it.
      text: a sentence, or empty: "A leads B". {leads} and {gains} are filled in by
        what the number says, {id} by the number of another claim.
      study: a folder of `results/`; empty for a struck claim without a number.
      measure: an accuracy, `global` or `personal_prior`; else a key of `MEASURES`.
      a: a row of the study's `table.md`.
      b: the row that is taken from it; empty: the number is the mean of `a`.
      less: two rows, whose difference is taken from that of `a` and `b`.
      rounds: first and last, whose evaluations count; empty: those of final numbers.
      overturn: the outcome that would overturn it.
      struck: the date on which it was struck out; empty while it stands.
      reason: of that.
    """

    id: str
    text: str = ""
    study: str = ""
    measure: str = ""
    a: str = ""
    b: str = ""
    less: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    overturn: str = ""
    struck: str = ""
    reason: str = ""


class Number(NamedTuple):
    """The number of a claim.

    Attributes:
      title: of its measure.
      cell: what is claimed, bold where a difference exceeds its interval.
      gain: +1 where the difference exceeds it in the better direction, -1 in the
        worse, 0 where it cannot be told; None of a mean.
      paired: None of a mean.
      seeds: number of them.
      ours: the mean of `a`.
      others: that of `b`; NaN without one.
      rates: "tuned" or "untuned", of both rows where they differ.
    """

    title: str
    cell: Cell
    gain: int | None
    paired: Paired | None
    seeds: int
    ours: Cell
    others: Cell
    rates: str


class Computed(NamedTuple):
    """All that pages quote.

    Attributes:
      claims: by id.
      numbers: by the id of the claim; a struck one may have none.
      tables: cells of the tables of means, heads first, by the table's name.
    """

    claims: Mapping[str, Claim]
    numbers: Mapping[str, Number]
    tables: Mapping[str, Sequence[Sequence[str]]]


def find_measure(name: str) -> tuple[str, Measure]:
    """Key and measure of `global`, `final_global_accuracy`, `mean_load_cv` and so on.

    Raises:
      UserError: there is none.
    """
    if name.startswith(TARGET):
        return name, Measure("", title=f"Rounds to {name.removeprefix(TARGET)}")
    for key in (name, f"final_{name}_accuracy"):
        if key in MEASURES:
            return key, MEASURES[key]
    raise UserError(
        f"claims: measure {name!r} is unknown; allowed: global, personal, "
        "personal_prior and other accuracies, keys of MEASURES, and rounds_to.TARGET"
    )


def pick(table: Mapping[str, Seeds], label: str, study: str) -> Seeds:
    """The numbers of a row, by seed.

    Raises:
      UserError: the study has no such row.
    """
    if label not in table:
        raise UserError(
            f"claims: {study} has no row {label!r}; allowed: {', '.join(table)}"
        )
    return table[label]


def subtract(ours: Seeds, others: Seeds, key: str) -> Seeds:
    """The differences of a measure, over the seeds that both have."""
    return {
        seed: {
            key: ours[seed].get(key, NAN) - others[seed].get(key, NAN),
            DIVERGED: max(one[seed].get(DIVERGED, 0.0) for one in (ours, others)),
        }
        for seed in ours
        if seed in others
    }


def average(seeds: Seeds, key: str, measure: Measure) -> Cell:
    """Mean and interval over seeds; of rounds the median, and the seeds that got there.

    A mean over the seeds that reached a target would hide the others.
    """
    values = [one.get(key, NAN) for one in seeds.values()]
    if key.startswith(TARGET):
        return median_cell(values)
    return mean_cell(values, measure.scale, measure.digits)


def compare(claim: Claim, table: Mapping[str, Seeds]) -> Paired:
    """The difference of a claim, less a second one where it names one.

    Args:
      claim: with two rows.
      table: numbers by row and seed.

    Raises:
      UserError: the rows have no seed in common, or the measure has no difference.
    """
    key, measure = find_measure(claim.measure)
    if key.startswith(TARGET):
        raise UserError(
            f"claim {claim.id}: a difference of {key} hides seeds that never got "
            "there; allowed: no b"
        )
    ours, others = (pick(table, label, claim.study) for label in (claim.a, claim.b))
    if claim.less:
        first, second = (pick(table, label, claim.study) for label in claim.less)
        ours, others = subtract(ours, others, key), subtract(first, second, key)
    paired = pair_up(ours, others, key, measure)
    if not paired.pairs:
        raise UserError(
            f"claim {claim.id}: {claim.study} has no seed with {key} of all its rows; "
            "allowed: a measure that they have"
        )
    return paired


def compute(claim: Claim, study: Study) -> Number:
    """The number of a claim.

    Raises:
      UserError: the study lacks a row, a round or a seed of it, or the measure has no
        such number.
    """
    key, measure = find_measure(claim.measure)
    table = take_window(study, key, *claim.rounds) if claim.rounds else study.seeds
    ours = pick(table, claim.a, claim.study)
    title, mean = measure.title, average(ours, key, measure)
    if claim.rounds:
        title += ", rounds {} to {}".format(*claim.rounds)
    if not claim.b:
        rates, none = study.rates[claim.a], Cell("", NAN)
        return Number(title, mean, None, None, len(ours), mean, none, rates)
    paired = compare(claim, table)
    cell = difference_cell(paired, measure.digits)
    sign = (1 if paired.mean > 0 else -1) * (measure.better or 1)
    rates = dict.fromkeys(study.rates[label] for label in (claim.a, claim.b))
    return Number(
        title,
        cell,
        sign if cell.bold else 0,
        paired,
        paired.pairs,
        mean,
        average(table[claim.b], key, measure),
        " / ".join(rates),
    )


def read_claim(entry: Mapping[str, Any], section: Mapping[str, Any]) -> Claim:
    """A claim of the list, with the study and the measure that its section names.

    Raises:
      UserError: it has a field that no claim has, or lacks one.
    """
    shared = {k: section[k] for k in ("study", "measure") if k in section}
    values = {**shared, **entry} if "a" in entry else dict(entry)
    unknown = sorted(values.keys() - set(Claim._fields))
    if unknown or "id" not in values:
        raise UserError(
            f"claims: {unknown[0] if unknown else 'a claim without id'!r} is not "
            f"allowed; allowed: {', '.join(Claim._fields)}"
        )
    claim = Claim(**values)
    needed = ["reason"] if claim.struck else ["overturn", "study", "measure", "a"]
    for name in needed:
        if not getattr(claim, name):
            raise UserError(f"claim {claim.id}: {name} is empty; allowed: a text")
    for name in ("less", "rounds"):
        if len(getattr(claim, name)) not in (0, 2):
            raise UserError(
                f"claim {claim.id}: {name}={getattr(claim, name)}; allowed: two"
            )
    return claim._replace(struck=str(claim.struck))


def expand(claim: Claim, short: Mapping[str, str]) -> Claim:
    """The claim with the short names of its study's rows written out."""

    def whole(label: str) -> str:
        for name, change in short.items():
            label = label.replace(f"{{{name}}}", change)
        return label

    less = tuple(map(whole, claim.less))
    return claim._replace(a=whole(claim.a), b=whole(claim.b), less=less)


def read_studies(names: Iterable[str], results: Path) -> dict[str, Study]:
    """The studies that claims are taken from.

    Raises:
      UserError: one is not stored, or its `paired.csv` is of other runs.
    """
    studies = {name: read_study(results / name) for name in dict.fromkeys(names)}
    for name, study in studies.items():
        path = results / name / "paired.csv"
        for fault in find_disagreements(study, read_csv(path) if path.exists() else []):
            raise UserError(f"{fault}; allowed: files of the same runs")
    return studies


def list_claims(listed: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims of a list, by id.

    Raises:
      UserError: see `read_claim`; or an id is used twice.
    """
    claims: dict[str, Claim] = {}
    for section in listed["sections"]:
        for entry in section["claims"]:
            claim = read_claim(entry, section)
            if claim.id in claims:
                raise UserError(f"claim {claim.id} is there twice; allowed: one")
            known = listed["studies"]
            if claim.study and claim.study not in known:
                raise UserError(
                    f"claim {claim.id}: study {claim.study!r} is not listed; allowed: "
                    f"{', '.join(known)}"
                )
            short = known[claim.study].get("short", {}) if claim.study else {}
            claims[claim.id] = expand(claim, short)
    return claims


def tabulate(table: Mapping[str, Any], study: Study) -> list[list[str]]:
    """The means of some rows of a study, the best of each column bold.

    Args:
      table: its `measures`, and its `rows`: a label, or a label and a text for it.
      study: whose rows they are.

    Returns:
      The heads, and the cells of each row.

    Raises:
      UserError: a measure or a row is unknown.
    """
    named = [
        (row, f"`{row}`") if isinstance(row, str) else row for row in table["rows"]
    ]
    seeds = [pick(study.seeds, label, study.name) for label, _ in named]
    heads, columns = [""], []
    for name in table["measures"]:
        key, measure = find_measure(name)
        cells = [average(each, key, measure) for each in seeds]
        columns.append(mark_best(cells, measure.better, measure.zero_wins))
        heads.append(measure.title)
    texts = [
        [claims_page.show(c) if math.isfinite(c.value) else "–" for c in column]
        for column in columns
    ]
    rows = zip((text for _, text in named), *texts, strict=True)
    return [heads, *map(list, rows)]


def compute_all(listed: Mapping[str, Any], results: Path) -> Computed:
    """The claims and tables of a list.

    Args:
      listed: the content of `claims.toml`.
      results: the folder of the stored studies.

    Raises:
      UserError: see `list_claims`, `read_studies`, `compute` and `tabulate`.
    """
    claims, tables = list_claims(listed), listed["tables"]
    numbered = {name: claim for name, claim in claims.items() if claim.a}
    used = [claim.study for claim in numbered.values()]
    used += [table["study"] for table in tables.values()]
    studies = read_studies(used, results)
    return Computed(
        claims,
        {
            name: compute(claim, studies[claim.study])
            for name, claim in numbered.items()
        },
        {name: tabulate(each, studies[each["study"]]) for name, each in tables.items()},
    )


def main(arguments: list[str] | None = None) -> int:
    """Rewrites the pages, or checks them; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims")
    parser.add_argument("--check", action="store_true", help="writes nothing")
    flags = parser.parse_args(arguments)
    status = 0
    try:
        listed = tomllib.loads(LIST.read_text())
        computed = compute_all(listed, RESULTS)
        for name in PAGES:
            path = RESULTS.parent / name
            old = path.read_text()
            new = claims_page.rewrite(old, listed, computed, RESULTS)
            if new == old:
                continue
            if flags.check:
                status = 1
                print(f"{name}: {claims_page.first_change(old, new)}", file=sys.stderr)
            else:
                write_atomically(path, new)
    except (UserError, tomllib.TOMLDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
