"""Pictures of final numbers, clients and experts: arrays in, a matplotlib Figure out.

Figures are built without pyplot, so there is no global state and no display. Sizes are
those of a paper's column, so that the letters stay readable in print.
"""

import warnings
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmoe_jax.report.margins import (
    LEGEND,
    LETTERS,
    bar_room,
    line_height,
    open_panels,
    place_bar,
    settle,
    text_width,
    widest,
)
from fedmoe_jax.report.text import MOST_LETTERS, shorten

# Okabe and Ito's colours, which stay apart for colour-blind readers; without yellow,
# and with the lighter ones darkened, because labels are written in them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C5629B", "#B8860B", "#3FA3DE", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)))
MAP = "cividis"  # perceptually even, the same to colour-blind readers
GREY = "#666666"
DPI = 200
FAST = 1  # compression that saves time for a few more bytes
PARTICIPATION_BARS = 20  # at most
QUANTILES = 20  # dots of a row, at most
MOST_NUMBERS = 16  # columns of a map whose cells have numbers
MOST_TIER = 24  # letters of a tier's or class's name
LINE_INCHES = 0.125  # height of one line of the small letters
STYLE: dict[Any, Any] = {"font.size": 8, "axes.linewidth": 0.6, "legend.frameon": False}
STYLE |= {"text.parse_math": False}  # names of users may have a $
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


@rc_context(STYLE)
def save_png(figure: Figure, file: IO[bytes]) -> None:
    """Draws a figure; what is made while it is drawn has the style, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it is drawn as a box
        look: dict[str, Any] = dict(dpi=DPI, pil_kwargs={"compress_level": FAST})
        figure.savefig(file, format="png", **look)


def ticks(most: int) -> MaxNLocator:
    """At most so many whole-number ticks at multiples of 1, 2 or 5."""
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


class Map(NamedTuple):
    """A heat map.

    Attributes:
      values: [rows, columns].
      names: of the x axis, the y axis and the colours.
      low: the value of the darkest colour; None: the lowest of all.
      rounds: the first and the last column, where they are rounds; None: they count
        from 0.
    """

    values: np.ndarray
    names: tuple[str, str, str]
    low: float | None = None
    rounds: tuple[float, float] | None = None


def name_rows(
    panels: Sequence[Axes], labels: Sequence[str], most: int = MOST_LETTERS
) -> None:
    """Rows with a name each, the first on top, on the left of panels side by side.

    Args:
      panels: which share the rows.
      labels: the names.
      most: letters of a name.
    """
    for axes in panels:
        axes.grid(axis="y", color="#dddddd", lw=0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        names = [shorten(x, most) if axes is panels[0] else "" for x in labels]
        axes.set_yticks(range(len(labels)), names)
        axes.set_ylim(len(labels) - 0.5, -0.5)


@rc_context(STYLE)
def dots(labels: Sequence[str], panels: Sequence[Dots]) -> Figure:
    """Final numbers, percent or bits: a row per strategy, a panel per measure."""
    inner = 1.25, 0.19 * len(labels) + 0.2
    figure, grid = open_panels(len(panels), inner)
    for axes, panel in zip(grid, panels, strict=True):
        for row, values in enumerate(panel.points):
            look: dict[str, Any] = dict(color=COLOURS[row % len(COLOURS)])
            axes.plot(values, np.full(len(values), row), "o", ms=3, alpha=0.45, **look)
            look |= dict(fmt="|", ms=8, mew=1.4, elinewidth=0.9)
            axes.errorbar(panel.mean[row], row, xerr=panel.half[row], **look)
        axes.set_xlabel(shorten(panel.title))
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -2), min(right, 102))  # intervals know no 0 and 100 %
        axes.xaxis.set_major_locator(MaxNLocator(4))
    name_rows(grid, labels)
    settle(grid, inner, [0.0] * len(grid))
    return figure


def _heat(axes: Axes, drawn: Map) -> Axes:
    """Draws a heat map; returns its bar of colours."""
    values, names, low, rounds = drawn
    shown: dict[str, Any] = dict(cmap=MAP, aspect="auto", interpolation="nearest")
    if rounds is not None:
        shown["extent"] = (rounds[0] - 0.5, rounds[1] + 0.5, len(values) - 0.5, -0.5)
    image = axes.imshow(values, vmin=low, **shown)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(ticks(8))
    axes.yaxis.set_major_locator(ticks(10))
    return _colour_bar(axes, image.get_clim(), names[2])


def _colour_bar(axes: Axes, span: tuple[float, float], name: str) -> Axes:
    """The colours of a map from its lowest to its highest value, as axes."""
    low, high = span if span[0] < span[1] else (span[0], span[0] + 1)
    bar = axes.figure.add_axes((0, 0, 1, 1), ylabel=name)
    shades = np.linspace(0, 1, 256)[:, None]
    extent = (0, 1, low, high)
    bar.imshow(shades, cmap=MAP, aspect="auto", origin="lower", extent=extent)
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.yaxis.set_major_locator(MaxNLocator(5))
    bar.set_xticks([])
    bar.spines[:].set_visible(False)
    return bar


def _open_maps(
    maps: Sequence[Map], inner: tuple[float, float]
) -> tuple[Figure, list[Axes], list[Axes]]:
    """Heat maps side by side, and their bars of colours; `_settle_maps` ends them."""
    figure, panels = open_panels(len(maps), inner)
    return figure, panels, list(map(_heat, panels, maps))


def _settle_maps(
    panels: Sequence[Axes],
    bars: Sequence[Axes],
    inner: tuple[float, float],
    names: float = 0.0,
) -> None:
    settle(panels, inner, list(map(bar_room, bars)), names=names)
    for bar, panel in zip(bars, panels, strict=True):
        place_bar(bar, panel)


def _client_height(num_clients: int) -> float:
    """All pictures with a row per client are equally high, to be laid side by side."""
    return float(np.clip(0.125 * num_clients + 0.45, 1.75, 5.55))


def _mark_layers(axes: Axes, name: str, num_layers: int, num_experts: int) -> None:
    """Names the experts of an axis, `x` or `y`, by layer and draws the layers' borders.

    One layer is not marked.
    """
    if num_layers == 1:
        return
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
def quantile_dots(
    labels: Sequence[str], groups: Sequence[np.ndarray], title: str, *, coloured: bool
) -> Figure:
    """Clients' numbers in percent, a row for each group with a bar at its median.

    Args:
      labels: of the groups.
      groups: numbers of each, of any length; at most `QUANTILES` dots are drawn, each
        for an equal share of the numbers.
      title: of the axis.
      coloured: whether each row has its own colour.
    """
    inner = 2.6, 0.19 * len(labels) + 0.2
    figure, panels = open_panels(1, inner)
    (axes,) = panels
    for row, values in enumerate(groups):
        if not len(values):
            continue
        count = min(len(values), QUANTILES)
        shares = (np.arange(count) + 0.5) / count
        shown = np.quantile(values, shares, method="hazen")
        look: dict[str, Any] = dict(color=COLOURS[row % len(COLOURS) * coloured])
        axes.plot(shown, np.full(count, row), "o", ms=3, alpha=0.35, mew=0, **look)
        axes.plot(np.median(values), row, "|", ms=9, mew=1.6, **look)
    axes.set_xlabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    name_rows(panels, labels)
    settle(panels, inner, [0.0])
    return figure


@rc_context(STYLE)
def load_map(rounds: np.ndarray, load: np.ndarray) -> Figure:
    """Load [R, G, E] of every round as shares of that round, expert by round."""
    shares = 100 * load / np.maximum(load.sum(axis=-1, keepdims=True), 1)
    shares = shares.reshape(len(load), -1).T  # [G * E, R]
    names = ("Round", "Expert", "Share of round's load (%)")
    inner = 2.6, max(1.55, 0.16 * len(shares) + 0.35)
    drawn = Map(shares, names, 0.0, (rounds[0], rounds[-1]))
    figure, panels, bars = _open_maps([drawn], inner)
    _mark_layers(panels[0], "y", *load.shape[1:])
    _settle_maps(panels, bars, inner)
    return figure


@rc_context(STYLE)
def pair_maps(times_held: np.ndarray, num_rounds: int, fitness: np.ndarray) -> Figure:
    """Two maps of client-expert pairs side by side, layers beside each other.

    Args:
      times_held: [N, G, E] rounds in which each client held each expert.
      num_rounds: of all, for shares.
      fitness: [N, G, E] scores.
    """
    held = 100 * times_held / max(num_rounds, 1)
    num_clients, num_layers, num_experts = fitness.shape
    flat = [values.reshape(num_clients, -1) for values in (held, fitness)]
    inner = 1.9, _client_height(num_clients)
    figure, panels, bars = _open_maps(
        [
            Map(flat[0], ("Expert", "Client", "Rounds held (%)"), 0.0),
            Map(flat[1], ("Expert", "", "Fitness score")),
        ],
        inner,
    )
    for axes in panels:
        _mark_layers(axes, "x", num_layers, num_experts)
    panels[1].set_yticks([])  # those of its neighbour
    _settle_maps(panels, bars, inner)
    return figure


@rc_context(STYLE)
def expert_map(shares: np.ndarray, label_names: Names, what: str, share: str) -> Figure:
    """Share of each class or group that goes to each expert, [G, E, L] in [0, 1].

    `what` the columns are is written below them, and of what the `share` is beside.
    """
    num_layers, num_experts, num_labels = shares.shape
    shares = shares.reshape(-1, num_labels)
    inner = max(0.25 * num_labels, 1.0), max(1.5, 0.2 * len(shares) + 0.5)
    drawn = Map(100 * shares, (what, "Expert", f"Share of {share} (%)"), 0.0)
    figure, panels, bars = _open_maps([drawn], inner)
    (axes,) = panels
    _mark_layers(axes, "y", num_layers, num_experts)
    names = _name_classes(axes, label_names)
    place: dict[str, Any] = dict(ha="center", va="center", size=5.5)
    inks = choose_inks(shares, 0.0)
    for expert, label in np.argwhere(shares >= 0.005):
        place["color"] = inks[expert, label]
        axes.text(label, expert, f"{100 * shares[expert, label]:.0f}", **place)
    _settle_maps(panels, bars, inner, names)
    return figure


@rc_context(STYLE)
def strata_map(
    labels: Sequence[str],
    names: Names,
    values: np.ndarray,
    title: str,
    low_is_good: bool,
) -> Figure:
    """Numbers of every strategy in every stratum, [rows, L]; bright is good."""
    count = values.shape[1]
    inner = max(0.3 * count, 1.2), 0.19 * len(labels) + 0.2
    shown = -values if low_is_good else values
    figure, panels, bars = _open_maps([Map(shown, ("", "", title))], inner)
    (axes,), (bar,) = panels, bars
    axes.set_yticks(range(len(labels)), list(map(shorten, labels)))
    if low_is_good:
        bar.yaxis.set_major_formatter(lambda at, _: f"{abs(at):.3g}")
    below = _name_classes(axes, names)
    digits, inks = 2 if low_is_good else 0, choose_inks(shown)
    if count <= MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(values)):
            colour = inks[row, column]
            place: dict[str, Any] = dict(ha="center", va="center", size=5.5)
            text = f"{values[row, column]:.{digits}f}"
            axes.text(column, row, text, color=colour, **place)
    _settle_maps(panels, bars, inner, below)
    return figure


def choose_inks(values: np.ndarray, low: float | None = None) -> np.ndarray:
    """Black or white, what is read better on each cell of a map of these values.

    Args:
      values: [rows, columns], as they are drawn.
      low: the value of the darkest colour; None for the smallest one.
    """
    scale = Normalize(low)
    scale.autoscale_None(values[np.isfinite(values)])
    red, green, blue, _ = np.moveaxis(colormaps[MAP](scale(values)), -1, 0)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    return np.where(luminance > 0.5, "black", "white")


def _name_classes(axes: Axes, names: Names) -> float:
    """Names the x axis's ticks; returns the height of the names.

    Names that would touch one another are turned.
    """
    texts = [shorten(name, MOST_TIER) for name in names]
    axes.set_xticks(range(len(texts)), texts)
    if max(map(len, texts)) <= 2:
        return 0.0
    axes.tick_params(axis="x", labelrotation=45)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    return 0.71 * (widest(texts) + line_height(LETTERS))


@rc_context(STYLE)
def partition_bubbles(label_counts: np.ndarray, label_names: Names) -> Figure:
    """Examples of every client and class, [N, L], as areas of bubbles."""
    num_clients, num_labels = label_counts.shape
    inner = 0.2 * num_labels + 0.1, _client_height(num_clients)
    figure, panels = open_panels(1, inner)
    (axes,) = panels
    axes.set(xlabel="Class", ylabel="Client")
    # The widest bubble is a little wider than a row or a column; scatter wants points
    # squared.
    diameter = 1.4 * 72 * min(inner[1] / num_clients, 0.2)
    look: dict[str, Any] = dict(color=COLOURS[0], lw=0)
    client, label = np.nonzero(label_counts)
    most = max(int(label_counts.max()), 1)
    areas = diameter**2 * label_counts[client, label] / most
    axes.scatter(label, client, s=areas, alpha=0.75, **look)
    power = 10 ** int(np.log10(most))
    for count in sorted({max(power // 10, 1), power}):
        axes.scatter([], [], s=diameter**2 * count / most, label=f"{count}", **look)
    axes.legend(title="Examples", bbox_to_anchor=(1, 1))
    axes.set(xlim=(-0.7, num_labels - 0.3), ylim=(num_clients - 0.3, -0.7))
    axes.yaxis.set_major_locator(ticks(10))
    names = _name_classes(axes, label_names)
    legend = LEGEND + max(widest([f"{most}"]), text_width("Examples") - 0.3)
    settle(panels, inner, [legend], names=names)
    return figure


@rc_context(STYLE)
def capacity_bars(capacity: np.ndarray, tier: np.ndarray, tier_names: Names) -> Figure:
    """A histogram of the experts that clients can hold, [N] each, by device tier."""
    edges = np.arange(min(capacity.min(), 1), max(capacity.max(), 1) + 2) - 0.5
    return _tier_bars("Experts a client can hold", capacity, edges, tier, tier_names)


@rc_context(STYLE)
def accuracy_bars(
    title: str, percent: np.ndarray, tier: np.ndarray, tier_names: Names
) -> Figure:
    """A histogram of clients' accuracies in percent, [N] each, by device tier."""
    low = 5 * np.floor(min(percent.min(), 95) / 5)
    # In float32 the whole of a client's examples may be a little more than 100 %.
    inside = np.minimum(percent, 100)
    return _tier_bars(title, inside, np.arange(low, 101, 5), tier, tier_names)


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
    inner, names = (1.95, 1.65), [shorten(name, MOST_TIER) for name in tier_names]
    figure, panels = open_panels(1, inner)
    (axes,) = panels
    axes.set(xlabel=title, ylabel="Clients")
    width, bottom = edges[1] - edges[0], np.zeros(len(edges) - 1)
    for i, name in enumerate(names):
        counts, _ = np.histogram(values[tier == i], edges)
        colour = COLOURS[i % len(COLOURS)]
        centres = edges[:-1] + width / 2
        axes.bar(centres, counts, 0.7 * width, bottom, color=colour, label=name)
        bottom += counts
    axes.xaxis.set_major_locator(ticks(6))
    axes.yaxis.set_major_locator(ticks(5))
    axes.legend(bbox_to_anchor=(1, 1))
    settle(panels, inner, [LEGEND + widest(names)])
    return figure
