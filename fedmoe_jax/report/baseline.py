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
    "(pairs) in points ± half-width of its 95 % t-interval; bold where the mean "
    "exceeds it, as one in twenty does by chance. Won / lost: pairs in which the row "
    "is better / worse. p: of the two-sided sign test, which leaves equal pairs out."
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


def _paired_cells(paired: Paired, digits: int) -> list[Cell]:
    wins = f"{paired.wins} / {paired.losses}" if paired.pairs else "–"
    p = f"{paired.p:.3g}" if paired.pairs else "–"
    return [
        difference_cell(paired, digits),
        Cell(str(paired.pairs), paired.pairs),
        Cell(wins, paired.wins),
        Cell(p, paired.p),
    ]


def paired_section(runs: Sequence[Run], wanted: str) -> Section | None:
    """A table for each final measure; None where there is nothing to compare.

    Args:
      runs: of one label or several.
      wanted: see `find_baseline`.
    """
    baseline = find_baseline(runs, wanted)
    pairs = pair_with(baseline.label, runs) if baseline else []
    if baseline is None or not pairs:
        return None
    title, measures = f"Paired differences: less {baseline.label}", final_measures(runs)
    burdens, loads = pick_cells(runs, EVERYWHERE)
    heads = ("Strategy", "Difference", "Pairs", "Won / lost", "p", *burdens)
    sheets = []
    for key, found in pair_labels(runs, pairs).items():
        if any(paired.pairs for paired in found.values()):
            digits = measures[key].digits
            rows = {
                label: [*_paired_cells(paired, digits), *loads[label]]
                for (label, _), paired in found.items()
            }
            sheets.append(Sheet(measures[key].title, heads, rows))
    if not sheets:
        about = f"No row has a seed in common with {baseline.label}. {baseline.about}"
        return Section(title, about, ())
    return Section(title, f"{ABOUT} {baseline.about}", sheets)
