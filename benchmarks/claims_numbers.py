"""The number of a claim, and tables of a stored study's means and differences."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.claims_list import Claim
from benchmarks.studies import Study, take_window
from fedmoe_jax.attack.tables import SECTIONS
from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import Measure, UserError
from fedmoe_jax.report.cells import Cell, mark_best, mean_cell, median_cell
from fedmoe_jax.report.diverged import KEY as DIVERGED
from fedmoe_jax.report.paired import Paired, Seeds, difference_cell, find_gain, pair_up
from fedmoe_jax.report.runs import NAN
from fedmoe_jax.report.sheets import Sheet

TARGET = "rounds_to."  # measures whose numbers are rounds, maybe never
ATTACK_MEASURES = {
    column.key: Measure(
        "", title=column.title, scale=column.scale, digits=column.digits
    )
    for _, _, columns in SECTIONS
    for column in columns
}


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
    if name in ATTACK_MEASURES:
        return name, ATTACK_MEASURES[name]
    raise UserError(
        f"claims: measure {name!r} is unknown; allowed: global, personal, "
        "personal_prior and other accuracies, keys of MEASURES, columns of "
        "attacks.csv, and rounds_to.TARGET"
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
        first, last = claim.rounds
        title += f", round {last}" if first == last else f", rounds {first} to {last}"
    if not claim.b:
        rates, none = study.rates[claim.a], Cell("", NAN)
        return Number(title, mean, None, None, len(ours), mean, none, rates)
    paired = compare(claim, table)
    cell = difference_cell(paired, measure.digits)
    rates = dict.fromkeys(study.rates[label] for label in (claim.a, claim.b))
    return Number(
        title,
        cell,
        find_gain(paired, measure),
        paired,
        paired.pairs,
        mean,
        average(table[claim.b], key, measure),
        " / ".join(rates),
    )


def tabulate_differences(table: Mapping[str, Any], study: Study) -> Sheet:
    """Differences of some pairs of strategies, a row for each change of the config.

    Args:
      table: its `measures`, its `pairs` of strategies, the second of which is taken
        from the first, and its `rows`: a change, empty for the study's own config, and
        a text for it.
      study: whose rows they are.

    Raises:
      UserError: see `find_measure` and `compare`.
    """
    rows: dict[str, list[Cell]] = {text: [] for _, text in table["rows"]}
    heads = [""]
    for name in table["measures"]:
        _, measure = find_measure(name)
        for pair in table["pairs"]:
            heads.append("{}: `{}` less `{}`".format(measure.title, *pair))
            for change, text in table["rows"]:
                a, b = (f"{strategy} {change}".strip() for strategy in pair)
                claim = Claim(text, study=study.name, measure=name, a=a, b=b)
                paired = compare(claim, study.seeds)
                rows[text].append(difference_cell(paired, measure.digits))
    return Sheet("", heads, rows)


def tabulate(table: Mapping[str, Any], study: Study) -> Sheet:
    """The means of some rows of a study, the best of each column bold.

    Args:
      table: its `measures`, and its `rows`: a label, or a label and a text for it.
      study: whose rows they are.

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
        known = [c if math.isfinite(c.value) else Cell("–", NAN) for c in cells]
        columns.append(mark_best(known, measure.better, measure.zero_wins))
        heads.append(measure.title)
    rows = zip(*columns, strict=True)
    texts = (text for _, text in named)
    return Sheet("", heads, dict(zip(texts, rows, strict=True)))
