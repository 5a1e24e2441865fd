"""The measures of each MoE layer, of models with several."""

from collections.abc import Mapping, Sequence

from fedmoe_jax.measures import LAYERS
from fedmoe_jax.options import Measure
from fedmoe_jax.report.cells import Cell, mean_cell
from fedmoe_jax.report.diverged import has_diverged, mark_cell
from fedmoe_jax.report.rows import Row
from fedmoe_jax.report.runs import (
    NAN,
    Run,
    group_runs,
    join_measures,
    name_runs,
    num_experts,
)
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.report.summary import measure_run

ABOUT = (
    "Each MoE layer by itself, layer 0 being that of the first block with experts; the "
    "columns of these names in the table of final numbers are means over layers. Of a "
    "seed over rounds as there, then the mean over seeds."
)


def count_layers(rows: Sequence[Row]) -> int:
    """The layers that have numbers of their own, 0 in a model with one."""
    lists = (row.get(name) or () for row in rows for name in LAYERS.values())
    return max(map(len, lists), default=0)


def take_layer(
    rows: Sequence[Row], layer: int, measures: Mapping[str, Measure]
) -> list[Row]:
    """Rows in which the fields of measures are those of ONE layer, None without."""
    taken = []
    for row in rows:
        own: Row = {"round": row["round"]}
        for key, measure in measures.items():
            values = row.get(LAYERS[key]) or ()
            own[measure.field] = values[layer] if layer < len(values) else None
        taken.append(own)
    return taken


def find_measures(runs: Sequence[Run]) -> dict[str, Measure]:
    """The measures, by keys of `LAYERS`, that a run has of each layer."""
    joined = join_measures(runs)
    known = {name for run in runs for row in run.rows for name in row}
    return {k: joined[k] for k, name in LAYERS.items() if k in joined and name in known}


def layer_cells(
    group: Sequence[Run], layer: int, measures: Mapping[str, Measure]
) -> list[Cell]:
    """The means of ONE layer over the runs of a label, marked where one diverged."""
    found = [
        measure_run(take_layer(run.rows, layer, measures), measures) for run in group
    ]
    cells = []
    for key, measure in measures.items():
        numbers = [one.get(key) for one in found]
        values = [NAN if number is None else number for number in numbers]
        cells.append(mean_cell(values, measure.scale, measure.digits))
    return list(map(mark_cell, cells)) if any(map(has_diverged, group)) else cells


def layers_section(runs: Sequence[Run]) -> Section | None:
    """A row for each label and layer; None where no mixture has several layers."""
    measures, rows = find_measures(runs), {}
    for label, group in group_runs(name_runs(runs)).items():
        mixtures = [run for run in group if num_experts(run) > 1]
        for layer in range(
            max((count_layers(run.rows) for run in mixtures), default=0)
        ):
            rows[f"{label}, layer {layer}"] = layer_cells(mixtures, layer, measures)
    if not rows:
        return None
    heads = ("Strategy", *(measure.title for measure in measures.values()))
    return Section("MoE layers", ABOUT, [Sheet("", heads, rows)])
