"""Pictures of final numbers, clients and experts: arrays in, a matplotlib Figure out.

Figures are built without pyplot, so there is no global state and no display. Sizes are
those of a paper's column, so that the letters stay readable in print.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which stay apart for colour-blind readers; without yellow,
# and with the lighter ones darkened, because labels are written in them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C5629B", "#B8860B", "#3FA3DE", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)))
MAP = "cividis"  # perceptually even, the same to colour-blind readers
GREY = "#666666"
DPI = 200
PARTICIPATION_BARS = 20  # at most
LINE_INCHES = 0.125  # height of one line of the small letters
STYLE: dict[Any, Any] = {"font.size": 8, "axes.linewidth": 0.6, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.fontsize": 7, "legend.title_fontsize": 7, "legend.loc": "upper left"}
for _axis in ("xtick", "ytick"):
    STYLE |= {f"{_axis}.labelsize": 7, f"{_axis}.major.width": 0.6}

Names = Sequence[str] | np.ndarray


class Dots(NamedTuple):
    """One measure of G strategies: every seed, the mean and its interval.

    Attributes:
      title: name and unit.
      points: per strategy, the [S] values of its seeds.
      mean: [G] means, NaN where there is none.
      half: [G] half-widths of the intervals, NaN where there is none.
    """

    title: str
    points: Sequence[np.ndarray]
    mean: np.ndarray
    half: np.ndarray


def ticks(most: int) -> MaxNLocator:
    """At most so many whole-number ticks at multiples of 1, 2 or 5."""
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


@rc_context(STYLE)
def dots(labels: Sequence[str], panels: Sequence[Dots]) -> Figure:
    """Final numbers in percent: one row per strategy, one panel per measure."""
    width = 1.45 * len(panels) + 0.06 * max(map(len, labels))
    figure = Figure(figsize=(width, 0.19 * len(labels) + 0.7), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        for row, values in enumerate(panel.points):
            look: dict[str, Any] = dict(color=COLOURS[row % len(COLOURS)])
            axes.plot(values, np.full(len(values), row), "o", ms=3, alpha=0.45, **look)
            look |= dict(fmt="|", ms=8, mew=1.4, elinewidth=0.9)
            axes.errorbar(panel.mean[row], row, xerr=panel.half[row], **look)
        axes.set_xlabel(panel.title)
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -2), min(right, 102))  # intervals know no 0 and 100 %
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color="#dddddd", lw=0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _heat(
    values: np.ndarray, names: tuple[str, str, str], size: tuple[float, float], **look
) -> Figure:
    """A heat map; names are of the x axis, the y axis and the colours."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=names[0], ylabel=names[1])
    shown: dict[str, Any] = dict(cmap=MAP, aspect="auto", interpolation="nearest")
    image = axes.imshow(values, **shown | look)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(ticks(8))
    axes.yaxis.set_major_locator(ticks(10))
    bar = figure.colorbar(image, ax=axes, label=names[2], pad=0.02, fraction=0.06)
    bar.outline.set_visible(False)
    return figure


def _client_size(width: float, num_clients: int) -> tuple[float, float]:
    """All pictures with a row per client are equally high, to be laid side by side."""
    return width, float(np.clip(0.125 * num_clients + 0.9, 2.2, 6.0))


def _mark_layers(figure: Figure, name: str, num_layers: int, num_experts: int) -> None:
    """Names the experts of an axis, `x` or `y`, by layer and draws the layers' borders.

    One layer is not marked.
    """
    if num_layers == 1:
        return
    axes = figure.axes[0]
    axis = getattr(axes, f"{name}axis")
    line: dict[str, Any] = dict(color="white", lw=1.0)
    axis.set_label_text("Layer.expert")
    axis.set_major_formatter(
        lambda at, _: ".".join(map(str, divmod(int(at), num_experts)))
    )
    for layer in range(1, num_layers):
        draw = axes.axvline if name == "x" else axes.axhline
        draw(layer * num_experts - 0.5, **line)


@rc_context(STYLE)
def load_map(rounds: np.ndarray, load: np.ndarray) -> Figure:
    """Load [R, G, E] of every round as shares of that round, expert by round."""
    shares = 100 * load / np.maximum(load.sum(axis=-1, keepdims=True), 1)
    shares = shares.reshape(len(load), -1).T  # [G * E, R]
    names = ("Round", "Expert", "Share of round's load (%)")
    size = (3.6, max(2.0, 0.16 * len(shares) + 0.8))
    extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(shares) - 0.5, -0.5)
    figure = _heat(shares, names, size, vmin=0, extent=extent)
    _mark_layers(figure, "y", *load.shape[1:])
    return figure


@rc_context(STYLE)
def assignment_map(times_held: np.ndarray, num_rounds: int) -> Figure:
    """Rounds in which each client held each expert, [N, G, E], as shares of all."""
    names = ("Expert", "Client", "Rounds held (%)")
    return _pair_map(100 * times_held / max(num_rounds, 1), names, vmin=0)


@rc_context(STYLE)
def fitness_map(fitness: np.ndarray) -> Figure:
    """Client-expert fitness scores [N, G, E]."""
    return _pair_map(fitness, ("Expert", "Client", "Fitness score"))


def _pair_map(values: np.ndarray, names: tuple[str, str, str], **look) -> Figure:
    """A heat map of client-expert pairs [N, G, E], the layers side by side."""
    num_clients, num_layers, num_experts = values.shape
    size = _client_size(2.9, num_clients)
    figure = _heat(values.reshape(num_clients, -1), names, size, **look)
    _mark_layers(figure, "x", num_layers, num_experts)
    return figure


@rc_context(STYLE)
def specialisation_map(shares: np.ndarray, label_names: Names) -> Figure:
    """Share of each class's gate mass that goes to each expert, [G, E, L] in [0, 1]."""
    num_layers, num_experts, num_labels = shares.shape
    shares = shares.reshape(-1, num_labels)
    size = (0.25 * num_labels + 1.2, max(2.0, 0.2 * len(shares) + 1.0))
    figure = _heat(
        100 * shares, ("Class", "Expert", "Share of gate mass (%)"), size, vmin=0
    )
    _mark_layers(figure, "y", num_layers, num_experts)
    axes = figure.axes[0]
    _name_classes(axes, label_names)
    place: dict[str, Any] = dict(ha="center", va="center", size=5.5)
    for expert, label in np.argwhere(shares >= 0.005):
        share = shares[expert, label]
        place["color"] = "black" if share > 0.45 * np.nanmax(shares) else "white"
        axes.text(label, expert, f"{100 * share:.0f}", **place)
    return figure


def _name_classes(axes: Axes, names: Names) -> None:
    """Names the x axis's ticks; names that would touch one another are turned."""
    turned: dict[str, Any] = dict(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xticks(
        range(len(names)), names, **turned if max(map(len, names)) > 2 else {}
    )


@rc_context(STYLE)
def partition_bubbles(label_counts: np.ndarray, label_names: Names) -> Figure:
    """Examples of every client and class, [N, L], as areas of bubbles."""
    num_clients, num_labels = label_counts.shape
    size = _client_size(0.2 * num_labels + 1.3, num_clients)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel="Class", ylabel="Client")
    # The widest bubble is a little wider than a row; scatter wants points squared.
    widest = 1.4 * 72 * (size[1] - 0.9) / num_clients
    look: dict[str, Any] = dict(color=COLOURS[0], lw=0)
    client, label = np.nonzero(label_counts)
    most = max(int(label_counts.max()), 1)
    areas = widest**2 * label_counts[client, label] / most
    axes.scatter(label, client, s=areas, alpha=0.75, **look)
    power = 10 ** int(np.log10(most))
    for count in sorted({max(power // 10, 1), power}):
        axes.scatter([], [], s=widest**2 * count / most, label=f"{count}", **look)
    axes.legend(title="Examples", bbox_to_anchor=(1, 1))
    axes.set(xlim=(-0.7, num_labels - 0.3), ylim=(num_clients - 0.3, -0.7))
    axes.yaxis.set_major_locator(ticks(10))
    _name_classes(axes, label_names)
    return figure


@rc_context(STYLE)
def capacity_bars(capacity: np.ndarray, tier: np.ndarray, tier_names: Names) -> Figure:
    """A histogram of the experts that clients can hold, [N] each, by device tier."""
    edges = np.arange(min(capacity.min(), 1), max(capacity.max(), 1) + 2) - 0.5
    return _tier_bars("Experts a client can hold", capacity, edges, tier, tier_names)


@rc_context(STYLE)
def participation_bars(
    participation: np.ndarray,
    num_rounds: int,
    tier: np.ndarray,
    tier_names: Names,
) -> Figure:
    """A histogram of the rounds in which clients counted, [N] each, by device tier."""
    width = -(-(num_rounds + 1) // PARTICIPATION_BARS)
    edges = np.arange(0, num_rounds + width + 1, width) - 0.5
    title = "Rounds in which an update counted"
    return _tier_bars(title, participation, edges, tier, tier_names)


def _tier_bars(
    title: str,
    values: np.ndarray,
    edges: np.ndarray,
    tier: np.ndarray,
    tier_names: Names,
) -> Figure:
    """A histogram of clients [N], stacked by device tier."""
    figure = Figure(figsize=(2.9, 2.2), layout="constrained")
    axes = figure.add_subplot(xlabel=title, ylabel="Clients")
    width, bottom = edges[1] - edges[0], np.zeros(len(edges) - 1)
    for i, name in enumerate(tier_names):
        counts, _ = np.histogram(values[tier == i], edges)
        colour = COLOURS[i % len(COLOURS)]
        centres = edges[:-1] + width / 2
        axes.bar(centres, counts, 0.7 * width, bottom, color=colour, label=name)
        bottom += counts
    axes.xaxis.set_major_locator(ticks(6))
    axes.yaxis.set_major_locator(ticks(5))
    axes.legend(bbox_to_anchor=(1, 1))
    return figure
