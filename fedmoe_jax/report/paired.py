"""Labels less a baseline, seed by seed: runs of one seed share split and weights."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from fedmoe_jax.options import FINAL, Measure, UserError, show
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.runs import NAN, Run, interval, join_measures, name_runs, numbers
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.report.tables import EVERYWHERE, pick_cells
from fedmoe_jax.report.targets import find_best
from fedmoe_jax.report.text import one_line
from fedmoe_jax.runtime.files import write_atomically

Seeds = Mapping[int, Mapping[str, float]]  # numbers of the runs of a label, by seed
FIELD = "evaluation.baseline"
CSV_FIELDS = (
    "strategy",
    "baseline",
    "measure",
    "difference",
    "half_width",
    "pairs",
    "wins",
    "losses",
    "sign_test_p",
)


class Paired(NamedTuple):
    """The differences of one label to another, over the seeds that both have.

    Attributes:
      mean: in the unit of the measure's column; NaN without a pair.
      half: half-width of its 95 % t-interval; NaN below two pairs.
      pairs: number of these seeds.
      wins: pairs in which the label is better.
      losses: pairs in which it is worse; equal ones are neither.
      p: of the two-sided sign test, in (0, 1]; NaN without a pair.
    """

    mean: float
    half: float
    pairs: int
    wins: int
    losses: int
    p: float


class Baseline(NamedTuple):
    """The label from which the others differ, and a sentence that says why it."""

    label: str
    about: str


def sign_test(wins: int, losses: int) -> float:
    """p of the two-sided sign test, which leaves equal pairs out; 1 without others.

    That of `scipy.stats.binomtest`, whose module takes longer to import than a report
    to draw.
    """
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def pair_up(ours: Seeds, others: Seeds, key: str, measure: Measure) -> Paired:
    """One measure of a label less that of another.

    Args:
      ours: of the label.
      others: of the label that is taken from it.
      key: of the measure.
      measure: `better` says what a win is, more where it is 0.
    """
    both = [seed for seed in ours if seed in others]
    less = [ours[seed].get(key, NAN) - others[seed].get(key, NAN) for seed in both]
    apart = measure.scale * np.array(less, float)
    apart = apart[np.isfinite(apart)]
    if not len(apart):
        return Paired(NAN, NAN, 0, 0, 0, NAN)
    mean, half = interval(apart)
    gains = apart if measure.better >= 0 else -apart
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    return Paired(mean, half, len(apart), wins, losses, sign_test(wins, losses))


def seeds_of(runs: Sequence[Run]) -> dict[str, dict[int, dict[str, float]]]:
    """The numbers of all runs, by label and seed; of equal seeds the first counts."""
    measures = join_measures(runs)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in name_runs(runs):
        seeds = found.setdefault(run.label, {})
        seeds.setdefault(run.config.get("seed", 0), numbers(run, measures, {}))
    return found


def final_measures(runs: Sequence[Run]) -> dict[str, Measure]:
    """The measures of final evaluations that have a column, by key."""
    measures = join_measures(runs)
    return {key: m for key, m in measures.items() if m.over == FINAL and m.title}


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


def pair_labels(runs: Sequence[Run], baseline: str) -> dict[str, dict[str, Paired]]:
    """Every label but the baseline less it, by the key of the measure and label."""
    seeds, measures = seeds_of(runs), final_measures(runs)
    return {
        key: {
            label: pair_up(ours, seeds[baseline], key, measure)
            for label, ours in seeds.items()
            if label != baseline
        }
        for key, measure in measures.items()
    }


def difference_cell(paired: Paired, digits: int) -> Cell:
    """Mean and half-width, bold where the mean is beyond it."""
    if not paired.pairs:
        return Cell("no pair", NAN)
    text = f"{paired.mean:+.{digits}f}"
    if paired.pairs == 1:
        return Cell(f"{text} (1 pair)", paired.mean)
    text += f" ± {paired.half:.{digits}f}"
    return Cell(text, paired.mean, abs(paired.mean) > paired.half)


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
    if baseline is None or len({run.label for run in name_runs(runs)}) < 2:
        return None
    title, measures = f"Paired differences: less {baseline.label}", final_measures(runs)
    burdens, loads = pick_cells(runs, EVERYWHERE)
    sheets = []
    for key, found in pair_labels(runs, baseline.label).items():
        if any(paired.pairs for paired in found.values()):
            digits = measures[key].digits
            rows = {
                label: [*_paired_cells(paired, digits), *loads[label]]
                for label, paired in found.items()
            }
            heads = ("Strategy", "Difference", "Pairs", "Won / lost", "p", *burdens)
            sheets.append(Sheet(measures[key].title, heads, rows))
    if not sheets:
        about = f"No row has a seed in common with {baseline.label}. {baseline.about}"
        return Section(title, about, ())
    about = (
        "Difference: of the row to the baseline, the mean over the seeds that both "
        "have (pairs) in points ± half-width of its 95 % t-interval; bold where the "
        "mean exceeds it, as one in twenty does by chance. Won / lost: pairs in which "
        "the row is better / worse. p: of the two-sided sign test, which leaves equal "
        f"pairs out. {baseline.about}"
    )
    return Section(title, about, sheets)


def write_paired_csv(path: str | Path, runs: Sequence[Run], wanted: str) -> None:
    """One row per label and final measure, of the numbers of `paired_section`.

    No file where there is nothing to compare. A field is empty where the number is
    unknown.
    """
    baseline = find_baseline(runs, wanted)
    if baseline is None or len({run.label for run in name_runs(runs)}) < 2:
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_FIELDS)
    for key, found in pair_labels(runs, baseline.label).items():
        for label, paired in found.items():
            values = ["" if np.isnan(x) else f"{x:.10g}" for x in paired]
            writer.writerow([label, baseline.label, key, *values])
    write_atomically(Path(path), text.getvalue())
