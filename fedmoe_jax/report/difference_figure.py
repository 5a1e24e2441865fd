"""The picture of all rows' differences to the baseline."""

from collections.abc import Iterator, Sequence

from fedmoe_jax.options import Measure
from fedmoe_jax.report.baseline import find_baseline, pair_with
from fedmoe_jax.report.figures import Picture, has_bits, title_final
from fedmoe_jax.report.forest import KEY, Difference, Panel, draw_forest
from fedmoe_jax.report.paired import Paired, final_measures, find_gain, pair_labels
from fedmoe_jax.report.runs import Run

CAPTION = (
    "Differences to {}, seed by seed: a dot at the mean, a line over its 95 % "
    "t-interval. " + KEY
)


def show_difference(paired: Paired, measure: Measure) -> Difference | None:
    """A difference as it is drawn; None without a pair."""
    if not paired.pairs:
        return None
    return Difference(paired.mean, paired.half, find_gain(paired, measure))


def difference_picture(runs: Sequence[Run], wanted: str) -> Iterator[Picture]:
    """The differences in the measures of the picture of final numbers.

    No picture where no row has a seed in common with the baseline.

    Args:
      runs: of one label or several.
      wanted: see `baseline.find_baseline`.
    """
    baseline, bits = find_baseline(runs, wanted), has_bits(runs)
    if baseline is None:
        return
    pairs = pair_with(baseline.label, runs)
    found, panels = pair_labels(runs, pairs), []
    for key, measure in final_measures(runs).items():
        cells = [show_difference(found[key][pair], measure) for pair in pairs]
        if title_final(measure, bits) and any(cells):
            panels.append(Panel(measure.title, measure.better, cells))
    if panels:
        figure = draw_forest([" less ".join(pair) for pair in pairs], panels)
        yield Picture("differences", CAPTION.format(baseline.label), figure)
