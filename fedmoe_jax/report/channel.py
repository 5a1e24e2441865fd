"""What knowledge of the channel, its links and the deadline change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.options import Measure
from fedmoe_jax.report.curves import Series, curves
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.ladders import (
    Ladder,
    find_known,
    find_ladders,
    ladder_rows,
    stack_values,
)
from fedmoe_jax.report.runs import Run, join_measures, name_runs
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.runtime.files import flatten


class Links(NamedTuple):
    """The links of clients to the server, or those of the gate to its experts.

    Attributes:
      kind: config field that turns them on.
      off: its value without them.
      fields: of the config, whose values are compared.
      shown: keys of measures, the columns.
      drawn: those of them that are drawn.
    """

    kind: str
    off: str
    fields: Sequence[str]
    shown: Sequence[str]
    drawn: Sequence[str]


LINKS = (
    Links(
        "channel.kind",
        "wired",
        (
            *("channel.csi", "channel.refresh", "channel.persistence"),
            *("channel.backoff", "devices.deadline", "channel_aware.price"),
        ),
        (
            *("final_global_accuracy", "final_personal_accuracy", "final_global_bits"),
            *("outage_share", "mean_late_clients", "wasted_megabytes", "mean_load_cv"),
            *("simulated_minutes", "kilojoules"),
        ),
        ("final_global_accuracy", "final_global_bits", "wasted_megabytes"),
    ),
    Links(
        "expert_links.kind",
        "none",
        (
            *("expert_links.sight", "expert_links.csi", "expert_links.persistence"),
            *("expert_links.price", "expert_links.start", "loss.latency"),
        ),
        (
            *("final_linked_accuracy", "final_linked_personal_accuracy"),
            *("final_linked_bits", "final_linked_delay", "final_global_accuracy"),
            *("final_global_bits", "mean_load_cv"),
        ),
        ("final_linked_accuracy", "final_linked_bits", "final_linked_delay"),
    ),
)
LEAST_VALUES = 3  # of a picture
ABOUT = (
    "Each table has the runs over a wireless channel, or over links to experts, that "
    "differ in one field and seed alone. The lowest value has its means; the others "
    "their differences to it over the seeds that both have, ± half-width of the 95 % "
    "t-interval, bold where the difference exceeds it."
)
CAPTION = (
    "{measure} by {field}: mean over seeds, the band from the lowest to the highest."
)


def choose_linked(runs: Sequence[Run], links: Links) -> list[Run]:
    """Those of some runs that have such links, named as all of them are."""
    kinds = [flatten(run.config).get(links.kind, links.off) for run in runs]
    if set(kinds) <= {links.off}:
        return []
    named = zip(name_runs(runs), kinds, strict=True)
    return [run for run, kind in named if kind != links.off]


def list_ladders(runs: Sequence[Run]) -> Iterator[tuple[Links, str, dict[str, Ladder]]]:
    """Every field of links of which a row has several values, with these rows."""
    for links in LINKS:
        linked = choose_linked(runs, links)
        for field in links.fields:
            ladders = find_ladders(linked, field)
            if ladders:
                yield links, field, ladders


def channel_section(runs: Sequence[Run]) -> Section | None:
    """What the fields of links change; None where no two values are compared."""
    sheets = []
    for links, field, ladders in list_ladders(runs):
        measures = find_known(ladders, join_measures(runs), links.shown)
        heads = "Strategy", *(measure.title for measure in measures.values())
        rows = ladder_rows(ladders, measures, field.split(".")[1])
        sheets.append(Sheet(field, heads, rows))
    return Section("The channel", ABOUT, sheets) if sheets else None


def keep_long(ladders: Mapping[str, Ladder]) -> dict[str, Ladder]:
    """Those with enough values for a curve, of the finite ones.

    No deadline, infinity, has no place on an axis.
    """
    finite = {
        label: {at: seeds for at, seeds in ladder.items() if math.isfinite(at)}
        for label, ladder in ladders.items()
    }
    return {label: each for label, each in finite.items() if len(each) >= LEAST_VALUES}


def draw_field(
    ladders: Mapping[str, Ladder], field: str, key: str, measure: Measure
) -> Iterator[Picture]:
    """A measure over a field, a curve for each row; none where no seed has all."""
    lines = []
    for place, (label, ladder) in enumerate(ladders.items()):
        values = measure.scale * stack_values(ladder, key)
        if len(values):
            lines.append(Series(place, label, np.array([*ladder]), values))
    if lines:
        caption = CAPTION.format(measure=measure.title, field=field)
        figure = curves(lines, measure.title, None, field)
        yield Picture(f"{field.replace('.', '_')}-{key}", caption, figure)


def channel_pictures(runs: Sequence[Run]) -> Iterator[Picture]:
    """Accuracy and costs over each field of which a row has three values or more."""
    measures = join_measures(runs)
    for links, field, ladders in list_ladders(runs):
        long = keep_long(ladders)
        for key, measure in find_known(long, measures, links.drawn).items():
            yield from draw_field(long, field, key, measure)
