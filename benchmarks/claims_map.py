"""The map of regimes: where a mixture leads the controls, and by how much."""

from collections.abc import Mapping
from typing import Any

from benchmarks.claims_numbers import find_measure
from benchmarks.studies import Study
from fedmoe_jax.options import UserError
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.duels import duel_cell, hold_duel
from fedmoe_jax.report.sheets import Sheet


def show_duel(study: Study, table: Mapping[str, Any], name: str) -> Cell:
    """The best of a map's controls beside the best of all other rows, in a measure.

    Args:
      study: with rows of both kinds.
      table: its `controls`, and `references`, which take no part; either may name rows
        that the study lacks.
      name: of the measure, see `find_measure`.

    Raises:
      UserError: it has no control or no other row with the measure.
    """
    key, measure = find_measure(name)
    left_out = table.get("references", ())
    seeds = {label: of for label, of in study.seeds.items() if label not in left_out}
    duel = hold_duel(seeds, table["controls"], key, measure)
    if duel is None:
        raise UserError(
            f"claims: {study.name} has the rows {', '.join(seeds)}; allowed: "
            f"some of {', '.join(table['controls'])} and some others, with {key}"
        )
    return duel_cell(duel, measure.digits, quote="`{}`".format)


def tabulate_map(table: Mapping[str, Any], studies: Mapping[str, Study]) -> Sheet:
    """The duel of every study in every measure.

    Args:
      table: its `rows`, a study and a text for it; `controls`, rows of the studies that
        are no mixtures; `measures`; maybe `references`, see `show_duel`.
      studies: by name.

    Raises:
      UserError: see `show_duel`.
    """
    heads = ["", *(find_measure(name)[1].title for name in table["measures"])]
    rows = {
        text: [show_duel(studies[study], table, name) for name in table["measures"]]
        for study, text in table["rows"]
    }
    return Sheet("", heads, rows)
