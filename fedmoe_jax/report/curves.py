"""Curves with their names at the end: plain arrays in, a matplotlib Figure out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from fedmoe_jax.report.margins import open_panels, settle, widest
from fedmoe_jax.report.plots import COLOURS, DASHES, GREY, LINE_INCHES, STYLE, ticks
from fedmoe_jax.report.text import shorten

Reference = tuple[float, str] | None  # a level to compare with, and its name


class Series(NamedTuple):
    """One labelled curve over rounds, with its repetitions.

    Attributes:
      place: picks the colour, so that a strategy keeps its own in every picture.
      label: what is written at the end of the curve.
      rounds: [P] the points' rounds.
      values: [S, P] float, one row per seed; NaN where a seed has no value. Every
        column has at least one number.
    """

    place: int
    label: str
    rounds: np.ndarray
    values: np.ndarray


class Tracks(NamedTuple):
    """One labelled curve over a cost, of which every seed has its own values.

    Attributes:
      place: picks the colour, as in `Series`.
      label: what is written at the end of the curve.
      seeds: at least one pair of [P] costs, which never fall, and [P] values.
    """

    place: int
    label: str
    seeds: Sequence[tuple[np.ndarray, np.ndarray]]


def spread(places: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Moves label positions apart, as little as possible in the least-squares sense.

    Args:
      places: [P] wanted positions.
      gap: least distance between neighbours.
      low: least position.
      high: greatest position; it gives way where the labels do not fit.
    Returns:
      [P] positions in the order of `places`.
    """
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    packed = isotonic_regression(places[order] - steps).x
    moved = np.empty(len(places))
    moved[order] = np.clip(packed, low, max(high - steps[-1], low)) + steps
    return moved


def common_mean(
    seeds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of broken lines over the range that all of them cover; empty if none.

    Beyond that range a mean would jump wherever a line begins or ends.

    Args:
      seeds: pairs of [P] costs, which never fall, and [P] values.
    Returns:
      [Q] costs, those of any line within the range, and [Q] means.
    """
    start = max(costs[0] for costs, _ in seeds)
    end = min(costs[-1] for costs, _ in seeds)
    grid = np.unique(np.concatenate([costs for costs, _ in seeds]))
    grid = grid[(grid >= start) & (grid <= end)]
    return grid, np.mean([np.interp(grid, *seed) for seed in seeds], axis=0)


def _look(place: int) -> dict[str, Any]:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return dict(color=COLOURS[place % len(COLOURS)], ls=dash)


def _open(
    labels: Sequence[str], xlabel: str, ylabel: str
) -> tuple[Figure, tuple[float, float]]:
    """A figure with room for the names at the curves' ends, and its axes' size."""
    inner = 2.45, max(2.05, LINE_INCHES * len(labels) + 0.35)
    figure, (axes,) = open_panels(1, inner)
    axes.set(xlabel=shorten(xlabel), ylabel=shorten(ylabel))
    axes.xaxis.set_major_locator(ticks(5))
    return figure, inner


def _compare(axes: Axes, reference: Reference) -> None:
    if reference is not None:
        level, name = reference
        axes.axhline(level, color=GREY, lw=0.8, ls=":")
        at: dict[str, Any] = dict(
            xycoords=axes.get_yaxis_transform(), textcoords="offset points"
        )
        axes.annotate(name, (0.02, level), (0, 2), color=GREY, size=6.5, **at)


def find_span(places: Sequence[np.ndarray]) -> tuple[float, float]:
    """From 0, or from the first place where that is nearer to the last, to the last.

    Args:
      places: rising positions of each curve, at least one.
    """
    first, last = min(each[0] for each in places), max(each[-1] for each in places)
    return (first, last) if last / 2 < first < last else (0, last)


def _label_ends(
    figure: Figure,
    inner: tuple[float, float],
    span: tuple[float, float],
    ends: Sequence[tuple[float, float, str, str]],
) -> None:
    """Fits the axes to `span`; writes (x, y, text, colour) at their right."""
    (axes,) = figure.axes
    axes.set_xlim(*span)
    last = span[1]
    low, high = axes.get_ylim()
    low = 0 if low < high / 2 else low
    axes.set_ylim(low, high)
    gap = (high - low) * LINE_INCHES / inner[1]
    places = spread(np.array([end[1] for end in ends]), gap, low, high)
    beside = axes.get_yaxis_transform()
    leader: dict[str, Any] = dict(lw=0.6, clip_on=False, transform=beside)
    for (x, y, text, colour), place in zip(ends, places, strict=True):
        axes.plot([x, last], [y, y], color=colour, lw=0.5, alpha=0.5)
        axes.plot([1, 1.04], [y, place], color=colour, **leader)
        letters: dict[str, Any] = dict(color=colour, size=7, va="center")
        axes.text(1.055, place, text, transform=beside, **letters)
    names = widest([text for _, _, text, _ in ends])
    settle([axes], inner, [0.055 * inner[0] + names])


@rc_context(STYLE)
def curves(
    series: Sequence[Series], ylabel: str, reference: Reference, xlabel: str = "Round"
) -> Figure:
    """Mean over seeds with a band from the lowest to the highest seed.

    Args:
      series: the curves, at least one.
      ylabel: name and unit of the values.
      reference: a level to compare with and its name, drawn as a dotted line.
      xlabel: name of what stands in `Series.rounds`.
    """
    figure, inner = _open([line.label for line in series], xlabel, ylabel)
    (axes,) = figure.axes
    _compare(axes, reference)
    ends = []
    for place, label, rounds, values in series:
        look, mean = _look(place), np.nanmean(values, axis=0)
        mark = "o" if len(rounds) == 1 else None  # a line of one point is none
        axes.plot(rounds, mean, lw=1.3, marker=mark, ms=2.5, **look)
        if len(values) > 1:
            band = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
            axes.fill_between(rounds, *band, color=look["color"], alpha=0.13, lw=0)
        ends.append((rounds[-1], mean[-1], shorten(label), look["color"]))
    span = find_span([line.rounds for line in series])
    _label_ends(figure, inner, span, ends)
    return figure


@rc_context(STYLE)
def cost_curves(
    tracks: Sequence[Tracks], xlabel: str, ylabel: str, reference: Reference
) -> Figure:
    """A thin line for each seed, and their mean as far as all of them reach.

    Args:
      tracks: the curves, at least one.
      xlabel: name and unit of the cost.
      ylabel: name and unit of the values.
      reference: as in `curves`.
    """
    figure, inner = _open([track.label for track in tracks], xlabel, ylabel)
    (axes,) = figure.axes
    _compare(axes, reference)
    ends = []
    for place, label, seeds in tracks:
        look, (grid, mean) = _look(place), common_mean(seeds)
        for costs, values in seeds:
            axes.plot(costs, values, lw=0.5, alpha=0.5, **look)
        axes.plot(grid, mean, lw=1.3, **look)
        # Where no cost is common to all, the name stands at the seed that ends last.
        end = (grid, mean) if len(grid) else max(seeds, key=lambda seed: seed[0][-1])
        ends.append((end[0][-1], end[1][-1], shorten(label), look["color"]))
        axes.plot(*ends[-1][:2], "o", ms=2.5, color=look["color"], clip_on=False)
    last = max(costs[-1] for track in tracks for costs, _ in track.seeds)
    _label_ends(figure, inner, (0, last), ends)
    return figure
