"""What tuning has tried: `tuning.csv`, and the curves of value against rate."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fedmoe_jax.report.plots import save_png
from fedmoe_jax.runtime.files import write_atomically, write_bytes

RATE = re.compile(r"client\.learning_rate=([^,]+),?")
COLUMNS = 4  # panels in a row
PANEL = (2.6, 2.0)  # inches


class Trial(NamedTuple):
    """One setting of one strategy, after so many rounds.

    Attributes:
      strategy: its name.
      change: of the config, `client.learning_rate=RATE` first.
      rounds: of the run.
      value: of the measure; NaN where the run diverged.
      made_by: what computed the run, flat.
    """

    strategy: str
    change: str
    rounds: int
    value: float
    made_by: Mapping[str, Any]


def write_tuning_csv(path: Path, trials: Iterable[Trial], measure: str) -> None:
    """One row per trial; of one that diverged the value is empty.

    The last columns trace its run, as those of `runs.csv`.
    """
    trials = list(trials)
    traced = dict.fromkeys(name for trial in trials for name in trial.made_by)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    columns = [f"made_by.{name}" for name in traced]
    writer.writerow(["strategy", "change", "rounds", measure, *columns])
    for trial in trials:
        value = "" if math.isnan(trial.value) else f"{trial.value:.10g}"
        origin = [trial.made_by.get(name) for name in traced]
        writer.writerow([trial.strategy, trial.change, trial.rounds, value, *origin])
    write_atomically(path, text.getvalue())


def write_tuning(workdir: Path, trials: Sequence[Trial], measure: str) -> None:
    """`tuning.csv` and its picture, `tuning.png`."""
    write_tuning_csv(workdir / "tuning.csv", trials, measure)
    picture = io.BytesIO()
    save_png(draw_tuning(trials, measure), picture)
    write_bytes(workdir / "tuning.png", picture.getvalue())


def split_rate(change: str) -> tuple[float, str]:
    """The client's learning rate of a change, and what else it changes."""
    found = RATE.search(change)
    return float(found[1]) if found else math.nan, RATE.sub("", change).strip(",")


def list_curves(
    trials: Iterable[Trial], strategy: str
) -> dict[str, list[tuple[float, float]]]:
    """(rate, value) by server and rounds, sorted by rate; without what diverged."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        rate, server = split_rate(trial.change)
        if trial.strategy == strategy and not math.isnan(trial.value):
            name = f"{server or 'as configured'}, {trial.rounds} rounds"
            curves.setdefault(name, []).append((rate, trial.value))
    return {name: sorted(points) for name, points in curves.items()}


def draw_tuning(trials: Sequence[Trial], measure: str) -> Figure:
    """A panel for each strategy: the measure against the client's learning rate."""
    strategies = list(dict.fromkeys(trial.strategy for trial in trials))
    rows = math.ceil(len(strategies) / COLUMNS)
    figure = Figure((COLUMNS * PANEL[0], rows * PANEL[1] + 1), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True).ravel()
    handles, rates = {}, sorted({split_rate(trial.change)[0] for trial in trials})
    curves = {strategy: list_curves(trials, strategy) for strategy in strategies}
    names = list(dict.fromkeys(name for each in curves.values() for name in each))
    for panel, (strategy, named) in zip(panels, curves.items(), strict=False):
        panel.set_title(strategy, fontsize=8)
        panel.set_xscale("log")
        # Plain numbers, as the style draws no mathtext.
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.set_xticks([], minor=True)
        for name, points in named.items():
            colour = f"C{names.index(name)}"
            (line,) = panel.plot(*zip(*points, strict=True), "o-", color=colour)
            handles.setdefault(name, line)
    for panel in panels[len(strategies) :]:
        panel.set_axis_off()
    figure.suptitle(f"{measure} against client.learning_rate", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", fontsize=7
    )
    return figure
