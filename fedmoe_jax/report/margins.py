"""Panels in a row, with margins from the lengths of the texts around them.

Matplotlib's own layouts draw a figure once more to find its margins, which takes
longer than drawing it. Lengths are in inches.
"""

import functools
import warnings
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

LETTERS, LABELS = 7.0, 8.0  # sizes in points, of most texts and of the axes' labels
PAD = 0.06  # from the edge of the paper
GAP = 0.04  # from the texts of the ticks to the label
TICK = 0.1  # from the axis to the texts of its ticks
LEGEND = 0.42  # a legend of one column without its texts
FINE = 16  # dots of a point, where lengths are measured
BAR = (0.06, 0.11)  # gap before a bar of colours, and its width


def line_height(size: float) -> float:
    """Height of a line of letters of so many points."""
    return 1.2 * size / 72


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float = LETTERS, weight: str = "normal") -> float:
    """Width of one line of letters of so many points, `normal` or `bold`."""
    font = get_font(findfont(FontProperties(weight=weight)))
    font.set_size(size, 72 * FINE)  # hinting rounds to whole dots
    with warnings.catch_warnings():  # a letter that the font lacks is a box
        warnings.simplefilter("ignore")
        font.set_text(text)
    return font.get_width_height()[0] / 64 / 72 / FINE


def widest(texts: Sequence[str], size: float = LETTERS) -> float:
    """Width of the widest line; 0 without any."""
    return max((text_width(text, size) for text in texts), default=0.0)


def open_panels(count: int, inner: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with axes of the same width and height; `settle` lays them out."""
    figure = Figure(figsize=(count * inner[0], inner[1]))
    places = [(at / count, 0.0, 1 / count, 1.0) for at in range(count)]
    return figure, [figure.add_axes(place) for place in places]


def read_ticks(axis: Axis) -> list[str]:
    """The texts of the ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    beyond = 1e-9 * (high - low)
    shown = [x for x in axis.get_majorticklocs() if low - beyond <= x <= high + beyond]
    return axis.get_major_formatter().format_ticks(shown)


def _beyond_right(panel: Axes, width: float) -> float:
    """By how much the texts of the x axis go beyond a panel's right edge.

    These are the text of the last tick in view, and the label, which is in the middle.

    Args:
      width: of the panel.
    """
    texts, (left, right) = read_ticks(panel.xaxis), panel.get_xlim()
    label = text_width(panel.get_xlabel(), LABELS)
    beyond = (label - width) / 2 + GAP if label > width - 2 * GAP else 0.0
    if not texts:
        return beyond
    places = [x for x in panel.get_xticks() if left <= x <= right] or [right]
    to_panel = panel.transScale + panel.transLimits
    share = to_panel.transform((places[-1], panel.get_ylim()[0]))[0]
    return max(text_width(texts[-1]) / 2 - (1 - share) * width, beyond)


def _label(axis: Axis, texts: float, length: float) -> float:
    """Puts an axis's label beyond the texts of its ticks; the room that both need.

    Args:
      axis: x or y.
      texts: room for the texts of the ticks.
      length: of the panel across the axis.
    """
    room = TICK + texts
    if axis.get_label_text():
        beyond = -(room + GAP) / length
        across = isinstance(axis, XAxis)
        axis.set_label_coords(*(0.5, beyond) if across else (beyond, 0.5))
        lines = axis.get_label_text().count("\n") + 1
        room += GAP + lines * line_height(LABELS)
    return PAD + room


def settle(
    panels: Sequence[Axes],
    inner: tuple[float, float],
    rights: Sequence[float],
    *,
    top: float = 0.0,
    names: float = 0.0,
) -> None:
    """Gives the panels their places and the figure its size.

    Args:
      panels: all axes of a figure.
      inner: width and height of each.
      rights: what each needs on its right.
      top: what they need above them.
      names: height of turned names below the x axes, which is their width, too.
    """
    figure, (width, height) = panels[0].get_figure(), inner
    assert isinstance(figure, Figure)
    lefts = [_label(p.yaxis, widest(read_ticks(p.yaxis)), width) for p in panels]
    lefts[0] = max(lefts[0], names)
    below = max(names, line_height(LETTERS))
    low = [p for p in panels if p.xaxis.get_ticks_position() != "top"]
    bottom = max((_label(panel.xaxis, below, height) for panel in low), default=PAD)
    ends = [_beyond_right(panel, width) for panel in panels]
    rooms = [PAD + max(pair) for pair in zip(rights, ends, strict=True)]
    top += PAD + line_height(LETTERS) / 2
    wide = len(panels) * width + sum(lefts) + sum(rooms)
    high = bottom + height + top
    figure.set_size_inches(wide, high)
    at = 0.0
    for panel, left, room in zip(panels, lefts, rooms, strict=True):
        place = (at + left) / wide, bottom / high, width / wide, height / high
        panel.set_position(place)
        at += left + width + room


def bar_room(bar: Axes) -> float:
    """What a bar of colours needs on the right of a panel, its texts included."""
    texts = TICK + widest(read_ticks(bar.yaxis)) + GAP
    return sum(BAR) + texts + line_height(LABELS)


def place_bar(bar: Axes, panel: Axes) -> None:
    """Puts a bar of colours on the right of a panel that has its place."""
    figure, place = panel.get_figure(), panel.get_position()
    assert isinstance(figure, Figure)
    gap, width = (part / figure.get_figwidth() for part in BAR)
    bar.set_position((place.x1 + gap, place.y0, width, place.height))
    beyond = 1 + (TICK + widest(read_ticks(bar.yaxis)) + GAP) / BAR[1]
    bar.yaxis.set_label_coords(beyond, 0.5)
