"""Differences with their intervals: a row for each pair, a panel for each measure."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmoe_jax.report.margins import open_panels, settle
from fedmoe_jax.report.plots import COLOURS, GREY, STYLE, name_rows
from fedmoe_jax.report.text import MOST_LETTERS, shorten

KEY = (  # how to read it, for captions
    "Blue is better, orange worse, grey cannot be told; an arrow points to the better "
    "side, and black is of measures without one."
)
PANEL, ROW = 1.25, 0.19  # inches
TITLE, NAME = 24, 120  # letters of a line of a measure's name and of a row's


class Difference(NamedTuple):
    """One difference.

    Attributes:
      mean: in the unit of its panel.
      half: half-width of its interval; NaN of one pair.
      gain: +1 where it exceeds the interval in the better direction, -1 in the worse, 0
        where it cannot be told.
    """

    mean: float
    half: float
    gain: int


class Panel(NamedTuple):
    """One measure of every pair.

    Attributes:
      title: name and unit.
      better: +1 where more is better, -1 where less is, 0 where neither.
      cells: one for each row, None where nothing is known.
    """

    title: str
    better: int
    cells: Sequence[Difference | None]


def find_colour(difference: Difference, better: int) -> str:
    """Blue of a gain, orange of a loss; black where a measure has no better direction.

    Grey is what cannot be told.
    """
    if not difference.gain:
        return GREY
    if not better:
        return "black"
    return COLOURS[0] if difference.gain > 0 else COLOURS[1]


def name_panel(panel: Panel) -> str:
    """The measure with an arrow in its better direction; of percent in points.

    On as many lines as a panel's width asks for, the arrow with the last word.
    """
    arrow = {1: "\xa0→", -1: "\xa0←", 0: ""}[panel.better]
    title, percent = panel.title.removesuffix(" %"), panel.title.endswith(" %")
    title = shorten(title, MOST_LETTERS) + (", points" if percent else "") + arrow
    return textwrap.fill(title, TITLE)


@rc_context(STYLE)
def draw_forest(rows: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """Means as dots, intervals as lines, beside a line at no difference.

    Args:
      rows: names of pairs, the first on top.
      panels: side by side, each with a cell for every row.
    """
    inner = PANEL, ROW * len(rows) + 0.2
    figure, grid = open_panels(len(panels), inner)
    for axes, panel in zip(grid, panels, strict=True):
        axes.axvline(0.0, color="black", lw=0.6)
        for at, cell in enumerate(panel.cells):
            if cell is None:
                continue
            look: dict[str, Any] = dict(color=find_colour(cell, panel.better))
            look |= dict(fmt="o", ms=3, elinewidth=1.1, alpha=1 if cell.gain else 0.7)
            half = None if math.isnan(cell.half) else cell.half
            axes.errorbar(cell.mean, at, xerr=half, **look)
        axes.set_xlabel(name_panel(panel))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    name_rows(grid, rows, NAME)
    settle(grid, inner, [0.0] * len(grid))
    return figure
