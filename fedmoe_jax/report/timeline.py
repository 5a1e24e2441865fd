"""Pictures of devices at work: arrays in, a matplotlib Figure out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedmoe_jax.report.margins import (
    LEGEND,
    LETTERS,
    line_height,
    open_panels,
    settle,
    text_width,
    widest,
)
from fedmoe_jax.report.plots import COLOURS, GREY, LINE_INCHES, STYLE, ticks
from fedmoe_jax.report.text import shorten

PHASES = {  # name: its colour
    "download": COLOURS[0],
    "training": COLOURS[1],
    "upload": COLOURS[2],
}
MOST_ROWS = 40
SLOWEST_ROWS = 20  # of them, where there are more clients


class Band(NamedTuple):
    """One outcome over rounds: its name, its colour and [R] clients."""

    name: str
    colour: str
    counts: np.ndarray


def choose_rows(seconds: np.ndarray) -> np.ndarray:
    """Clients to show, slowest first: all, or the slowest and an even sample.

    Args:
      seconds: [C] that each client takes.
    Returns:
      At most `MOST_ROWS` positions in `seconds`.
    """
    order = np.argsort(-seconds, kind="stable")
    if len(order) <= MOST_ROWS:
        return order
    others = order[SLOWEST_ROWS:]
    sample = np.linspace(0, len(others) - 1, MOST_ROWS - SLOWEST_ROWS).round()
    return np.concatenate([order[:SLOWEST_ROWS], others[sample.astype(int)]])


def last_second(phases: np.ndarray, spent: np.ndarray, deadline: float) -> float:
    """Seconds at which a timeline's axis ends, so that the work done fills it.

    A weak link can make a plan endless, and a deadline may be as good as none: either
    is shown up to four times the longest work done.

    Args:
      phases: [R, 3] seconds of each phase as planned.
      spent: [R, 3] in [0, 1], the share of each that took place.
      deadline: seconds.
    """
    planned = phases.sum(axis=1)
    done = (np.where(spent > 0, phases, 0) * spent).sum(axis=1).max()
    most = 4 * done if done > 0 else np.inf
    ends = np.append(planned, deadline)
    return 1.03 * float(ends[(ends <= most) & np.isfinite(ends)].max(initial=done))


@rc_context(STYLE)
def timeline(
    names: Sequence[str],
    phases: np.ndarray,
    spent: np.ndarray,
    endings: Sequence[str],
    deadline: float,
    last: float,
    *,
    of: str,
) -> Figure:
    """One bar per client: download, training, upload; pale where they did not happen.

    Args:
      names: of the R rows, at least one.
      phases: [R, 3] seconds of each phase as planned.
      spent: [R, 3] in [0, 1], the share of each that took place.
      endings: R words on the clients' outcomes; empty where merged at once.
      deadline: seconds.
      last: seconds at which the axis ends.
      of: label of the rows; may be empty.
    """
    inner = 3.5, max(LINE_INCHES * len(names) + 0.1, 0.8)
    figure, panels = open_panels(1, inner)
    (axes,) = panels
    axes.set(xlabel="Simulated time (s)", ylabel=of)
    # An endless plan is drawn to the edge of the picture.
    lengths = np.minimum(phases, 2 * last)
    starts = np.cumsum(lengths, axis=1) - lengths
    rows = np.arange(len(names))
    thick: dict[str, Any] = dict(lw=0.72 * 72 * inner[1] / (len(names) + 0.2))
    for phase, colour in enumerate(PHASES.values()):
        begin, length = starts[:, phase], lengths[:, phase]
        axes.hlines(rows, begin, begin + length, colour, alpha=0.22, **thick)
        done = length * spent[:, phase]
        axes.hlines(rows, begin, begin + done, colour, **thick)
    if deadline <= last:
        axes.axvline(deadline, color=GREY, lw=0.9, ls=":")
    for row, words in zip(range(len(names)), endings, strict=True):
        place: dict[str, Any] = dict(
            transform=axes.get_yaxis_transform(), va="center", size=6.5
        )
        axes.text(1.02, row, words, color=GREY, **place)
    axes.set(xlim=(0, last), ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(rows, list(map(shorten, names)), size=6)
    axes.tick_params(axis="y", length=0)
    legend = _explain(axes, pale=bool((spent < 1).any()), deadline=deadline <= last)
    right = max(0.02 * inner[0] + widest(endings), legend - inner[0])
    settle(panels, inner, [right], top=1.3 * line_height(LETTERS))
    return figure


def _explain(axes: Axes, *, pale: bool, deadline: bool) -> float:
    """The legend of a timeline, above it, with the colours that occur; its width."""
    shown = [Patch(color=colour, label=name) for name, colour in PHASES.items()]
    if pale:
        shown.append(Patch(color=GREY, alpha=0.3, label="did not happen"))
    if deadline:
        shown += axes.plot([], [], color=GREY, lw=0.9, ls=":", label="deadline")
    look: dict[str, Any] = dict(handlelength=1.1, columnspacing=1.0, handletextpad=0.4)
    place: dict[str, Any] = dict(
        loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=len(shown)
    )
    axes.legend(handles=shown, **place, **look)
    names = [str(handle.get_label()) for handle in shown]
    keys = 2.5 * LETTERS / 72 * len(names)  # their colours and the space around them
    return sum(map(text_width, names)) + keys


@rc_context(STYLE)
def outcome_bands(rounds: np.ndarray, bands: Sequence[Band]) -> Figure:
    """Clients of every round by outcome, stacked in the order given.

    Args:
      rounds: [R] consecutive rounds, at least one.
      bands: the first at the bottom.
    """
    inner = 2.45, 1.8
    figure, panels = open_panels(1, inner)
    (axes,) = panels
    axes.set(xlabel="Round", ylabel="Clients")
    edges = np.append(rounds, rounds[-1] + 1) - 0.5
    bottom = np.zeros(len(rounds))
    for name, colour, counts in bands:
        top = bottom + counts
        look: dict[str, Any] = dict(fill=True, color=colour, lw=0, label=name)
        axes.stairs(top, edges, baseline=bottom, **look)
        bottom = top
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, bottom.max()))
    axes.xaxis.set_major_locator(ticks(6))
    axes.yaxis.set_major_locator(ticks(5))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], bbox_to_anchor=(1, 1))
    settle(panels, inner, [LEGEND + widest(labels)])
    return figure


@rc_context(STYLE)
def belief_bubbles(capacity: np.ndarray, belief: np.ndarray) -> Figure:
    """Believed against true capacity of every client, [N] each.

    A bubble's area, and the number in it, is how many clients are there.
    """
    pairs, counts = np.unique(
        np.stack([capacity, belief], axis=1), axis=0, return_counts=True
    )
    most = int(pairs.max())
    width = float(np.clip(0.3 * most + 0.3, 1.7, 3.9))
    figure, panels = open_panels(1, (width, width))
    (axes,) = panels
    axes.set(xlabel="Experts it can truly hold", ylabel="Experts the server believes")
    span = (-0.6 if pairs.min() < 1 else 0.4, most + 0.6)
    axes.plot(span, span, color=GREY, lw=0.7, ls=":", zorder=0)
    # The widest bubble is nearly as wide as a step; scatter wants points squared.
    step = 0.9 * 72 * width / (span[1] - span[0])
    error = np.sign(pairs[:, 1] - pairs[:, 0])
    colours = np.array([COLOURS[0], "#BBBBBB", COLOURS[1]])[error + 1]
    # No bubble is smaller than a letter.
    areas = np.maximum(step**2 * counts / counts.max(), 60.0)
    axes.scatter(*pairs.T, s=areas, c=colours, lw=0)
    if most <= 12:
        look: dict[str, Any] = dict(ha="center", va="center_baseline", size=6.5)
        for (x, y), count in zip(pairs, counts, strict=True):
            axes.text(x, y, f"{count}", color="k" if x == y else "w", **look)
    axes.set(xlim=span, ylim=span, aspect="equal")
    axes.xaxis.set_major_locator(ticks(8))
    axes.yaxis.set_major_locator(ticks(8))
    settle(panels, (width, width), [0.0])
    return figure
