"""The map of regimes: where a mixture leads the controls, and by how much."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.claims_numbers import find_measure
from benchmarks.claims_pictures import Drawing
from benchmarks.studies import Study
from fedmoe_jax.options import Measure, UserError
from fedmoe_jax.report.cells import NO_DATA, Cell
from fedmoe_jax.report.duels import Duel, duel_cell, hold_duel
from fedmoe_jax.report.map_plot import draw_map
from fedmoe_jax.report.regime_map import judge
from fedmoe_jax.report.runs import NAN
from fedmoe_jax.report.sheets import Sheet


class Place(NamedTuple):
    """One cell of a map.

    Attributes:
      duel: of the best mixture and the best control.
      measure: in which they are compared.
      unit: of the margin, where a column has several.
    """

    duel: Duel
    measure: Measure
    unit: str


def read_column(column: str | list[str]) -> tuple[str, list[str]]:
    """Title and measures of a column: a measure, or a title and several measures."""
    if isinstance(column, str):
        return find_measure(column)[1].title, [column]
    return column[0], column[1:]


def find_place(
    study: Study, table: Mapping[str, Any], column: str | list[str]
) -> Place | None:
    """The best of a map's controls beside the best of all other rows.

    Args:
      study: with rows of both kinds.
      table: its `controls`, and `references`, which take no part; either may name rows
        that the study lacks.
      column: see `read_column`; the first of its measures that the study has counts.

    Raises:
      UserError: it has no control or no other row.
    """
    left_out, controls = table.get("references", ()), table["controls"]
    seeds = {label: of for label, of in study.seeds.items() if label not in left_out}
    if not set(seeds) & set(controls) or set(seeds) <= set(controls):
        raise UserError(
            f"claims: {study.name} has the rows {', '.join(seeds)}; allowed: "
            f"some of {', '.join(controls)} and some others"
        )
    _, names = read_column(column)
    for name in names:
        key, measure = find_measure(name)
        duel = hold_duel(seeds, controls, key, measure)
        if duel:
            bits = len(names) > 1 and "bits" in measure.title
            return Place(duel, measure, "bits" if bits else "")
    return None


def rename(place: Place | None, names: Sequence[tuple[str, str]]) -> Place | None:
    """A cell with other words for parts of its rows' names."""
    if place is None:
        return None
    words = dict(mixture=place.duel.mixture, control=place.duel.control)
    for part, name in names:
        words = {kind: label.replace(part, name) for kind, label in words.items()}
    return place._replace(duel=place.duel._replace(**words))


def show_place(place: Place | None) -> Cell:
    """A cell of the table."""
    if place is None:
        return Cell(NO_DATA, NAN)
    duel, measure, unit = place
    return duel_cell(duel, measure.digits, quote="`{}`".format, unit=unit)


class Map(NamedTuple):
    """A map.

    Attributes:
      titles: of its columns.
      places: its cells, by the texts of its rows.
    """

    titles: list[str]
    places: dict[str, list[Place | None]]


def read_map(table: Mapping[str, Any], studies: Mapping[str, Study]) -> Map:
    """The duel of every study in every column.

    Args:
      table: its `rows`, a study and a text for it; `controls`, rows of the studies that
        are no mixtures; `measures`, its columns; maybe `references`, see `find_place`,
        and `names`, pairs of a part of a row's name and what stands for it.
      studies: by name.

    Raises:
      UserError: see `find_place`.
    """
    columns, names = table["measures"], table.get("names", ())
    return Map(
        [read_column(column)[0] for column in columns],
        {
            text: [
                rename(find_place(studies[study], table, column), names)
                for column in columns
            ]
            for study, text in table["rows"]
        },
    )


def tabulate_map(found: Map) -> Sheet:
    """A map as a table."""
    rows = {
        text: [show_place(each) for each in row] for text, row in found.places.items()
    }
    return Sheet("", ["", *found.titles], rows)


def describe_map(found: Map) -> str:
    """All that a map says, as the text by which its picture is known."""
    sheet = tabulate_map(found)
    rows = [[text, *(cell.text for cell in row)] for text, row in sheet.rows.items()]
    return "\n".join(" | ".join(row) for row in [sheet.heads, *rows])


def draw_places(found: Map) -> Drawing:
    """The picture of a map."""
    cells = [
        [each and judge(each.duel, each.measure.digits, each.unit) for each in row]
        for row in found.places.values()
    ]
    return Drawing(
        describe_map(found), lambda: draw_map(list(found.places), found.titles, cells)
    )
