"""The picture of a map of regimes: who leads in every cell, and by how much."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedmoe_jax.report.margins import (
    LETTERS,
    line_height,
    open_panels,
    settle,
    text_width,
)
from fedmoe_jax.report.plots import COLOURS, GREY, STYLE
from fedmoe_jax.report.text import shorten

CELL = (1.45, 0.36)  # inches, at least
ROOM = 0.15  # inches beside the widest line of a cell
SIZES = (7.0, 6.0)  # points, of the two lines
MOST = 44  # letters of a line in a cell
WEIGHTS = ("bold", "normal")  # of the two lines, where somebody leads
COLUMN = 26  # letters of a column's name
SHADES = (0.12, 0.5)  # from the least to the most of a lead, as opacity


class Verdict(NamedTuple):
    """One cell.

    Attributes:
      lead: +1 where a mixture leads, -1 where a control does, 0 where neither.
      margin: by how much, above 0; its shade is its share of the largest one of the
        column in its unit.
      lines: two lines of text.
      unit: of the margin, any text.
    """

    lead: int
    margin: float
    lines: tuple[str, str]
    unit: str = ""


def shade(verdict: Verdict, column: Sequence[Verdict | None]) -> dict[str, Any]:
    """Colour and opacity of a cell among those of its column."""
    if not verdict.lead:
        return dict(facecolor=GREY, alpha=0.06)
    alike = [each for each in column if each and each.unit == verdict.unit]
    most = max(each.margin for each in alike if each.lead)
    share = verdict.margin / most if most else 0.0
    low, high = SHADES
    colour = COLOURS[0] if verdict.lead > 0 else COLOURS[1]
    return dict(facecolor=colour, alpha=low + (high - low) * share)


def shorten_lines(verdict: Verdict) -> list[str]:
    """The two lines of a cell as they are drawn."""
    return [shorten(line, MOST) for line in verdict.lines]


def measure_width(cells: Sequence[Sequence[Verdict | None]]) -> float:
    """The width of a column in inches, in which every line has room."""
    widths = [
        text_width(line, size, weight)
        for verdict in itertools.chain(*cells)
        if verdict
        for line, size, weight in zip(
            shorten_lines(verdict), SIZES, WEIGHTS, strict=True
        )
    ]
    return max(CELL[0], ROOM + max(widths, default=0.0))


def write_lines(axes: Axes, column: int, row: int, verdict: Verdict) -> None:
    """The two lines of a cell, grey where nobody leads."""
    (first, second), (large, small) = shorten_lines(verdict), SIZES
    ink, weight = ("black", WEIGHTS[0]) if verdict.lead else (GREY, "normal")
    place: dict[str, Any] = dict(ha="center", color=ink)
    axes.text(
        column, row - 0.04, first, va="bottom", size=large, weight=weight, **place
    )
    axes.text(column, row + 0.06, second, va="top", size=small, **place)


@rc_context(STYLE)
def draw_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Verdict | None]],
) -> Figure:
    """A map of regimes by measures.

    Args:
      rows: names of regimes.
      columns: names of measures.
      cells: [rows, columns], None where nothing is known.
    """
    inner = measure_width(cells) * len(columns), CELL[1] * len(rows)
    figure, panels = open_panels(1, inner)
    (axes,) = panels
    for at, column in enumerate(zip(*cells, strict=True)):
        for row, verdict in enumerate(column):
            if verdict is None:
                continue
            look = shade(verdict, column)
            axes.add_patch(Rectangle((at - 0.5, row - 0.5), 1, 1, lw=0, **look))
            write_lines(axes, at, row, verdict)
    for at in range(1, len(columns)):
        axes.axvline(at - 0.5, color="white", lw=1.5)
    for at in range(1, len(rows)):
        axes.axhline(at - 0.5, color="white", lw=1.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), [shorten(name, COLUMN) for name in columns])
    axes.set_yticks(range(len(rows)), [shorten(name) for name in rows])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    settle(panels, inner, [0.0], top=line_height(LETTERS))
    return figure
