"""The share of hidden units that clients keep, by layer and by capacity."""

from collections.abc import Sequence

from fedmoe_jax.report.cells import mean_cell
from fedmoe_jax.report.runs import NAN, Run, group_runs, name_runs
from fedmoe_jax.report.sheets import Section, Sheet

FIELD = "kept_by_capacity"  # of a row: [K + 1, layers], None without a client
ABOUT = (
    "Hidden units that clients keep in each layer, in the last round: the layers of "
    "the stem where it is pruned, and the experts of each MoE layer. Clients are apart "
    "by the whole experts that the server believes they have room for; the last of "
    "these have room for as many or more. Shares that differ between layers are the "
    "scores' own choice: one threshold cuts all layers of a client."
)


def take_shares(run: Run) -> list[list[float]]:
    """The shares of the last round that has them, rows by capacity; [] without any."""
    for row in reversed(run.rows):
        if row.get(FIELD):
            number = lambda value: NAN if value is None else float(value)
            return [[number(value) for value in each] for each in row[FIELD]]
    return []


def name_layers(runs: Sequence[Run], count: int) -> list[str]:
    """The layers' names, the MoE layers last."""
    loads = [row.get("expert_load") for run in runs for row in run.rows]
    nested = [load for load in loads if load and isinstance(load[0], list)]
    moe = len(nested[0]) if nested else 1
    stem = [f"Stem {i} %" for i in range(count - moe)]
    return [*stem, *(f"Experts {g} %" if moe > 1 else "Experts %" for g in range(moe))]


def pruned_section(runs: Sequence[Run]) -> Section | None:
    """A table for each number of layers; None where nothing is pruned."""
    tables: dict[tuple[str, ...], dict] = {}
    for label, group in group_runs(name_runs(runs)).items():
        found = [shares for shares in map(take_shares, group) if shares]
        if not found:
            continue
        heads = tuple(name_layers(group, len(found[0][0])))
        for capacity in range(len(found[0])):
            rows = [shares[capacity] for shares in found]
            columns = list(zip(*rows, strict=True))
            if all(value != value for column in columns for value in column):
                continue
            cells = [mean_cell(list(column), 100.0, 1) for column in columns]
            name = f"{label}, room for {capacity}"
            tables.setdefault(heads, {})[name] = cells
    sheets = [Sheet("", ("Strategy", *heads), rows) for heads, rows in tables.items()]
    return Section("Units kept", ABOUT, sheets) if sheets else None
