"""Systems in parts: what their assignment does, and what all else that they do."""

from collections.abc import Sequence
from typing import NamedTuple

from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.paired import Pair, difference_cell, final_measures, pair_labels
from fedmoe_jax.report.runs import Run, name_runs
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.report.tables import EVERYWHERE, pick_cells

SHARED_GATE, RANDOM = "_shared_gate", "random"  # in names of strategies, see list_parts
ABOUT = (
    f"A row NAME{SHARED_GATE} has the assignment of NAME, and gate, loss and weights "
    f"of {RANDOM}. Assignment: it less {RANDOM}. The rest: NAME less it, what the "
    "system owes to its gate, loss and weights. Rows that are tuned have rates of "
    "their own, which are in these differences, too. Seed by seed, as the paired "
    "differences."
)


class Part(NamedTuple):
    """A part of a system: its label, the part's name, and what less what it is."""

    label: str
    name: str
    pair: Pair


def list_parts(runs: Sequence[Run]) -> list[Part]:
    """The parts of all systems that have a row with the shared gate.

    A row `NAME_shared_gate` differs from the row `random` in nothing but its
    assignment, `NAME` from it in all else. A sibling has the same changes, `random` has
    them or none.
    """
    labels = list(dict.fromkeys(run.label for run in name_runs(runs)))
    parts = []
    for label in labels:
        name, _, changes = label.partition(" ")
        shared = f"{name}{SHARED_GATE} {changes}".strip()
        plain = [x for x in (f"{RANDOM} {changes}".strip(), RANDOM) if x in labels]
        if shared in labels:
            parts += [Part(label, "assignment", (shared, x)) for x in plain[:1]]
            parts.append(Part(label, "the rest", (label, shared)))
    return parts


def parts_section(runs: Sequence[Run]) -> Section | None:
    """What each system owes to its assignment, and what to all else that it does.

    None where no system has a row with the shared gate.
    """
    parts, measures = list_parts(runs), final_measures(runs)
    if not parts:
        return None
    burdens, loads = pick_cells(runs, EVERYWHERE)
    found, rows = pair_labels(runs, [part.pair for part in parts]), {}
    for label, name, pair in parts:
        cells = [
            difference_cell(found[key][pair], m.digits) for key, m in measures.items()
        ]
        pairs = max(found[key][pair].pairs for key in measures)
        row = f"{label}: {name} ({' less '.join(pair)})"
        rows[row] = [Cell(str(pairs), pairs), *cells, *loads[pair[0]]]
    titles = [measure.title for measure in measures.values()]
    sheet = Sheet("", ("System", "Pairs", *titles, *burdens), rows)
    return Section("Assignment, and what else the system does", ABOUT, [sheet])
