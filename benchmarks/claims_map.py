"""The map of regimes: where a mixture leads the controls, and by how much."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.claims_list import Claim
from benchmarks.claims_numbers import (
    Number,
    average,
    compute,
    find_measure,
    pick,
)
from benchmarks.studies import Study
from fedmoe_jax.options import Measure, UserError
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.sheets import Sheet


class Duel(NamedTuple):
    """The best mixture beside the best control, by their means in one measure.

    Both are chosen by the numbers that are compared, so that the difference of two that
    are alike is partly luck.

    Attributes:
      mixture: its row.
      control: its row.
      number: the mixture less the control.
    """

    mixture: str
    control: str
    number: Number


def find_best(study: Study, labels: Sequence[str], key: str, measure: Measure) -> str:
    """The row of the best mean; the first one of equals."""
    sign = measure.better or 1
    mean = lambda label: average(pick(study.seeds, label, study.name), key, measure)
    return max(labels, key=lambda label: sign * mean(label).value)


def hold_duel(study: Study, controls: Sequence[str], name: str) -> Duel:
    """The best of the controls and the best of all other rows, beside each other.

    Args:
      study: with rows of both kinds.
      controls: rows, which it may lack.
      name: of a measure, see `find_measure`.

    Raises:
      UserError: it has no control or no other row, or see `compute`.
    """
    key, measure = find_measure(name)
    known = [label for label in controls if label in study.seeds]
    others = [label for label in study.seeds if label not in controls]
    if not known or not others:
        raise UserError(
            f"claims: {study.name} has the rows {', '.join(study.seeds)}; allowed: "
            f"some of {', '.join(controls)} and some others"
        )
    a, b = (find_best(study, labels, key, measure) for labels in (others, known))
    claim = Claim("map", study=study.name, measure=name, a=a, b=b)
    return Duel(a, b, compute(claim, study))


def show_duel(duel: Duel) -> Cell:
    """The winner and its margin, bold where the difference exceeds its interval."""
    mixture, control, number = duel
    if not number.gain:
        text = f"`{mixture}` {number.cell.text} less `{control}`"
    else:
        pair = (mixture, control) if number.gain > 0 else (control, mixture)
        text = "`{}` {} over `{}`".format(
            pair[0], number.cell.text.lstrip("+-"), pair[1]
        )
    return number.cell._replace(text=text)


def tabulate_map(table: Mapping[str, Any], studies: Mapping[str, Study]) -> Sheet:
    """The duel of every study in every measure.

    Args:
      table: its `rows`, a study and a text for it; `controls`, rows of the studies that
        are no mixtures; and `measures`.
      studies: by name.

    Raises:
      UserError: see `hold_duel`.
    """
    heads = ["", *(find_measure(name)[1].title for name in table["measures"])]
    rows = {
        text: [
            show_duel(hold_duel(studies[study], table["controls"], name))
            for name in table["measures"]
        ]
        for study, text in table["rows"]
    }
    return Sheet("", heads, rows)
