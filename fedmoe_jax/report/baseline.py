"""The label from which a report takes the differences of the others."""

from collections.abc import Sequence
from typing import NamedTuple

from fedmoe_jax.options import UserError, show
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.paired import (
    Pair,
    Paired,
    difference_cell,
    final_measures,
    pair_labels,
)
from fedmoe_jax.report.runs import Run, name_runs
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.report.tables import EVERYWHERE, pick_cells
from fedmoe_jax.report.targets import find_best
from fedmoe_jax.report.text import one_line

FIELD = "evaluation.baseline"
ABOUT = (
    "Difference: of the row to the baseline, the mean over the seeds that both have "
    "(pairs), in points or in the column's unit, ± half-width of its 95 % t-interval; "
    "of bits less is better; bold where the mean exceeds it, as one in twenty does by "
    "chance. After it: pairs in which the row is better / worse, and p of the sign "
    "test, two-sided, which leaves equal pairs out; of three it is never below 0.25."
)


class Baseline(NamedTuple):
    """The label from which the others differ, and a sentence that says why it."""

    label: str
    about: str


def check_baseline(runs: Sequence[Run], wanted: str) -> None:
    """Checks that a baseline is a label of these runs.

    Raises:
      UserError: it is not.
    """
    labels = list(dict.fromkeys(run.label for run in name_runs(runs)))
    if wanted not in labels:
        raise UserError(
            f"{FIELD}={show(wanted)} is not allowed; allowed: a row of the report: "
            f"{', '.join(map(one_line, labels))}"
        )


def find_baseline(runs: Sequence[Run], wanted: str) -> Baseline | None:
    """The label that is wanted, else the best control; None before any evaluation.

    Args:
      runs: all that are compared.
      wanted: a label, `evaluation.baseline`; empty for the best control.
    """
    if wanted in {run.label for run in name_runs(runs)}:
        return Baseline(wanted, f"{wanted} is the baseline that {FIELD} names.")
    best = find_best(runs)
    if best is None:
        return None
    about = (
        f"{best.label} is the best {best.kind} by its mean final global accuracy, "
        f"chosen by the numbers that are compared; {FIELD} names another baseline."
    )
    if wanted:
        about = f"{FIELD}={wanted} names no row of this report. {about}"
    return Baseline(best.label, about)


def pair_with(baseline: str, runs: Sequence[Run]) -> list[Pair]:
    """Every other label with the baseline."""
    labels = dict.fromkeys(run.label for run in name_runs(runs))
    return [(label, baseline) for label in labels if label != baseline]


def paired_cell(paired: Paired, digits: int) -> Cell:
    """The difference, pairs won / lost, and p of the sign test."""
    cell = difference_cell(paired, digits)
    if not paired.pairs:
        return cell
    test = f"{paired.wins} / {paired.losses}, p {paired.p:.2g}"
    return cell._replace(text=f"{cell.text}; {test}")


def paired_section(runs: Sequence[Run], wanted: str) -> Section | None:
    """One table, a column a final measure; None where there is nothing to compare.

    Args:
      runs: of one label or several.
      wanted: see `find_baseline`.
    """
    baseline = find_baseline(runs, wanted)
    pairs = pair_with(baseline.label, runs) if baseline else []
    if baseline is None or not pairs:
        return None
    title = f"Paired differences: less {baseline.label}"
    found = {
        key: by_pair
        for key, by_pair in pair_labels(runs, pairs).items()
        if any(paired.pairs for paired in by_pair.values())
    }
    if not found:
        about = f"No row has a seed in common with {baseline.label}. {baseline.about}"
        return Section(title, about, ())
    measures, (burdens, loads) = final_measures(runs), pick_cells(runs, EVERYWHERE)
    rows = {}
    for pair in pairs:
        counts = max(by_pair[pair].pairs for by_pair in found.values())
        cells = [
            paired_cell(of[pair], measures[key].digits) for key, of in found.items()
        ]
        rows[pair[0]] = [Cell(str(counts), counts), *cells, *loads[pair[0]]]
    titles = [measures[key].title for key in found]
    heads = ("Strategy", "Pairs", *titles, *burdens)
    return Section(title, f"{ABOUT} {baseline.about}", (Sheet("", heads, rows),))
