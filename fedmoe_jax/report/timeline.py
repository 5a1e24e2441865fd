"""Pictures of devices at work: arrays in, a matplotlib Figure out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedmoe_jax.report.plots import COLOURS, GREY, LINE_INCHES, STYLE, ticks

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
    clients: np.ndarray,
    phases: np.ndarray,
    spent: np.ndarray,
    endings: Sequence[str],
    deadline: float,
    last: float,
) -> Figure:
    """One bar per client: download, training, upload; pale where they did not happen.

    Args:
      clients: [R] numbers of the clients, at least one.
      phases: [R, 3] seconds of each phase as planned.
      spent: [R, 3] in [0, 1], the share of each that took place.
      endings: R words on the clients' outcomes; empty where merged at once.
      deadline: seconds.
      last: seconds at which the axis ends.
    """
    height = LINE_INCHES * len(clients) + 0.95
    figure = Figure(figsize=(4.4, max(height, 1.6)), layout="constrained")
    axes = figure.add_subplot(xlabel="Simulated time (s)", ylabel="Client")
    # An endless plan is drawn to the edge of the picture.
    lengths = np.minimum(phases, 2 * last)
    starts = np.cumsum(lengths, axis=1) - lengths
    rows = np.arange(len(clients))
    bar: dict[str, Any] = dict(height=0.72, lw=0)
    for phase, colour in enumerate(PHASES.values()):
        begin, length = starts[:, phase], lengths[:, phase]
        axes.barh(rows, length, left=begin, color=colour, alpha=0.22, **bar)
        done = length * spent[:, phase]
        axes.barh(rows, done, left=begin, color=colour, **bar)
    if deadline <= last:
        axes.axvline(deadline, color=GREY, lw=0.9, ls=":")
    for row, words in zip(range(len(clients)), endings, strict=True):
        place: dict[str, Any] = dict(
            transform=axes.get_yaxis_transform(), va="center", size=6.5
        )
        axes.text(1.02, row, words, color=GREY, **place)
    axes.set(xlim=(0, last), ylim=(len(clients) - 0.4, -0.6))
    axes.set_yticks(rows, map(str, clients), size=6)
    axes.tick_params(axis="y", length=0)
    _explain(axes, pale=bool((spent < 1).any()), deadline=deadline <= last)
    return figure


def _explain(axes: Axes, *, pale: bool, deadline: bool) -> None:
    """The legend of a timeline, above it, with the colours that occur in it."""
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


@rc_context(STYLE)
def outcome_bands(rounds: np.ndarray, bands: Sequence[Band]) -> Figure:
    """Clients of every round by outcome, stacked in the order given.

    Args:
      rounds: [R] consecutive rounds, at least one.
      bands: the first at the bottom.
    """
    figure = Figure(figsize=(4.4, 2.3), layout="constrained")
    axes = figure.add_subplot(xlabel="Round", ylabel="Clients")
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
    width = float(np.clip(0.3 * most + 0.9, 2.2, 4.5))
    figure = Figure(figsize=(width, width), layout="constrained")
    axes = figure.add_subplot(
        xlabel="Experts it can truly hold", ylabel="Experts the server believes"
    )
    span = (-0.6 if pairs.min() < 1 else 0.4, most + 0.6)
    axes.plot(span, span, color=GREY, lw=0.7, ls=":", zorder=0)
    # The widest bubble is nearly as wide as a step; scatter wants points squared.
    widest = 0.9 * 72 * (width - 0.6) / (span[1] - span[0])
    error = np.sign(pairs[:, 1] - pairs[:, 0])
    colours = np.array([COLOURS[0], "#BBBBBB", COLOURS[1]])[error + 1]
    # No bubble is smaller than a letter.
    areas = np.maximum(widest**2 * counts / counts.max(), 60.0)
    axes.scatter(*pairs.T, s=areas, c=colours, lw=0)
    if most <= 12:
        look: dict[str, Any] = dict(ha="center", va="center_baseline", size=6.5)
        for (x, y), count in zip(pairs, counts, strict=True):
            axes.text(x, y, f"{count}", color="k" if x == y else "w", **look)
    axes.set(xlim=span, ylim=span, aspect="equal")
    axes.xaxis.set_major_locator(ticks(8))
    axes.yaxis.set_major_locator(ticks(8))
    return figure
