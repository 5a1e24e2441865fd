"""Pictures of attacks: what they find, beside what the defences cost."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from fedmoe_jax.attack.membership import NAN
from fedmoe_jax.privacy.defences import DEFENCES
from fedmoe_jax.report.margins import LEGEND, open_panels, settle, widest
from fedmoe_jax.report.plots import COLOURS, GREY, STYLE
from fedmoe_jax.report.runs import Run
from fedmoe_jax.report.text import shorten


class Panel(NamedTuple):
    """One attack's panel.

    Attributes:
      key: of the attack's numbers.
      title: of its axis.
      scale: by which it multiplies the number, 100 for percent.
      blind: what is found without the history: a number, or the key of one.
    """

    key: str
    title: str
    scale: float
    blind: float | str


PANELS = (
    *(
        Panel(f"{kind}_{view}_ridge", f"{title}, {text} (%)", 100.0, f"{kind}_mean")
        for kind, title in (("mix_majority", "Majority label"), ("groups", "Group"))
        for view, text in (("link", "from held sets"), ("server", "by the server"))
    ),
    Panel("pairs_auc", "Similar clients (AUC)", 1.0, 0.5),
    Panel("groups_auc", "Clients of a group (AUC)", 1.0, 0.5),
    Panel("members_loss_auc", "Members, by loss (AUC)", 1.0, 0.5),
    Panel("members_lira_auc", "Members, LiRA (AUC)", 1.0, 0.5),
)
ACCURACY, EPSILON = "final_personal_accuracy", "epsilon"
OVER_EPSILON = (
    *(panel for panel in PANELS if panel.key in ("pairs_auc", "groups_auc")),
    *(panel for panel in PANELS if panel.key == "members_loss_auc"),
    Panel(ACCURACY, "Personal accuracy (%)", 100.0, NAN),
    Panel("mean_load_cv", "Load CV", 1.0, NAN),
    Panel("labels_known", "Expert-label information", 1.0, NAN),
)
MARKS = {  # by defence
    "none": "o",
    "feedback_noise": "s",
    "selection": "^",
    "flip": "D",
    "clip": "v",
    "several": "P",
}
INNER = (1.7, 1.7)  # inches


class Point(NamedTuple):
    """One row of the tables of attacks: means over its seeds.

    Attributes:
      strategy: its name.
      defence: a key of `MARKS`.
      numbers: means of the numbers of its runs that are known.
    """

    strategy: str
    defence: str
    numbers: Mapping[str, float]


def name_defence(run: Run) -> str:
    """The defence that a run has, `none`, or `several`."""
    private = run.config.get("privacy", {})
    on = [name for name in DEFENCES if private.get(name, 0) > 0]
    return "several" if len(on) > 1 else (on or ["none"])[0]


def average_rows(
    runs: Sequence[Run], numbers: Sequence[Mapping[str, float]]
) -> list[Point]:
    """A point for each label, in the order of their first runs.

    Args:
      runs: with labels.
      numbers: of each.
    """
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(run.label, []).append(place)
    points = []
    for places in groups.values():
        first, each = runs[places[0]], [numbers[place] for place in places]
        known: dict[str, list[float]] = {}
        for key, x in itertools.chain.from_iterable(one.items() for one in each):
            if math.isfinite(x):
                known.setdefault(key, []).append(x)
        means = {key: float(np.mean(values)) for key, values in known.items()}
        strategy = str(first.config["strategy"])
        points.append(Point(strategy, name_defence(first), means))
    return points


def draw_panel(
    axes: Axes, points: Sequence[Point], panel: Panel, colours: Mapping[str, str]
) -> None:
    """One attack over the personal accuracy, a mark for each row that has both."""
    key, title, scale, blind = panel
    for point in points:
        if {key, ACCURACY} <= point.numbers.keys():
            place = 100 * point.numbers[ACCURACY], scale * point.numbers[key]
            mark, colour = MARKS[point.defence], colours[point.strategy]
            axes.plot(*place, mark, color=colour, ms=4, alpha=0.75, mew=0)
    usual = [
        p.numbers.get(blind, NAN) if isinstance(blind, str) else blind for p in points
    ]
    known = [scale * level for level in usual if math.isfinite(level)]
    if known:
        axes.axhline(float(np.mean(known)), color=GREY, lw=0.8, ls=(0, (4, 1.5)))
    axes.set(xlabel="Personal accuracy (%)", ylabel=title)


def show_power(value: float, _: float = 0.0) -> str:
    """A power of ten, as texts are not TeX."""
    exponent = str(round(math.log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def draw_over_epsilon(
    axes: Axes, points: Sequence[Point], panel: Panel, colours: Mapping[str, str]
) -> None:
    """One number over epsilon, a mark for each row with a guarantee.

    A dashed line is a strategy without a defence.
    """
    key, title, scale, _ = panel
    for strategy, defence, numbers in points:
        level, epsilon = scale * numbers.get(key, NAN), numbers.get(EPSILON, 0.0)
        if math.isfinite(level) and epsilon > 0:
            mark, colour = MARKS[defence], colours[strategy]
            axes.plot(epsilon, level, mark, color=colour, ms=4, alpha=0.75, mew=0)
        elif math.isfinite(level) and defence == "none":
            axes.axhline(level, color=colours[strategy], lw=0.8, ls=(0, (4, 1.5)))
    axes.set(xlabel="Epsilon", ylabel=title, xscale="log")
    axes.xaxis.set_major_formatter(show_power)
    axes.xaxis.set_minor_formatter(NullFormatter())


def pick_colours(points: Sequence[Point]) -> dict[str, str]:
    """A colour for each strategy, the same in all pictures of the same points."""
    names = dict.fromkeys(point.strategy for point in points)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def open_and_draw(
    points: Sequence[Point],
    panels: Sequence[Panel],
    draw: Callable[..., None],
    marks: Collection[str],
    colours: Mapping[str, str],
) -> Figure:
    """A figure with the panels and, at their right, strategies and defences.

    Args:
      points: the rows to draw.
      panels: one or more.
      draw: (axes, points, panel, colours of the strategies) -> None.
      marks: defences that are drawn as marks.
      colours: by strategy.
    """
    names = list(dict.fromkeys(point.strategy for point in points))
    figure, opened = open_panels(len(panels), INNER)
    for axes, panel in zip(opened, panels, strict=True):
        draw(axes, points, panel, colours)
    used = [mark for mark in MARKS if mark in marks]
    texts = [shorten(name) for name in (*names, *used)]
    line = lambda colour, mark: Line2D([], [], color=colour, marker=mark, ls="", ms=4)
    handles = [line(colours[name], "o") for name in names]
    handles += [line(GREY, MARKS[mark]) for mark in used]
    opened[-1].legend(handles, texts, bbox_to_anchor=(1, 1))
    rights = [0.0] * (len(panels) - 1) + [LEGEND + widest(texts)]
    settle(opened, INNER, rights)
    return figure


@rc_context(STYLE)
def draw_attacks(points: Sequence[Point]) -> Figure | None:
    """What attacks find over what is left of the accuracy; None without any.

    The dashed line is what is found without a history: chance, or for labels and groups
    the mean mix of the other clients.
    """
    found = {key for point in points for key in point.numbers}
    known = [panel for panel in PANELS if panel.key in found and ACCURACY in found]
    marks = {point.defence for point in points}
    if not known:
        return None
    return open_and_draw(points, known, draw_panel, marks, pick_colours(points))


@rc_context(STYLE)
def draw_epsilons(points: Sequence[Point]) -> Figure | None:
    """Attacks, accuracy, load and information over epsilon; None without an epsilon.

    An epsilon of 0, of what follows no data, has no place on the axis.
    """
    private = [p for p in points if p.numbers.get(EPSILON, 0.0) > 0]
    found = {key for point in private for key in point.numbers}
    known = [panel for panel in OVER_EPSILON if panel.key in found]
    # Of several rows without a defence the first is the strategy as it is.
    without: dict[str, Point] = {}
    for point in points:
        if point.defence == "none":
            without.setdefault(point.strategy, point)
    shown = [*without.values(), *private]
    marks = {point.defence for point in private}
    if not known:
        return None
    colours = pick_colours(points)
    return open_and_draw(shown, known, draw_over_epsilon, marks, colours)
