"""The differences of a section's claims in one picture."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.claims_list import Claim
from benchmarks.claims_numbers import Number, find_measure
from benchmarks.claims_pictures import Drawing
from fedmoe_jax.options import UserError
from fedmoe_jax.report.difference_figure import show_difference
from fedmoe_jax.report.forest import Difference, Panel, draw_forest

VERB = "{leads}"
FEWEST = 2  # pairs of a measure that has a panel
Key = tuple[str, ...]  # of a row: the study, and the rows that are compared


def name_difference(a: str, b: str) -> str:
    """A row less another, what they share in front: "SHARED: A less B"."""
    shared = [word for word in a.split() if word in b.split()]
    rests = [
        " ".join(word for word in row.split() if word not in shared) or "none"
        for row in (a, b)
    ]
    return ": ".join(filter(None, [" ".join(shared), " less ".join(rests)]))


def name_pair(claim: Claim) -> str:
    """A claim's pair as its sentence has it, without its measure: "A less B"."""
    head, verb, tail = claim.text.partition(VERB)
    plain = name_difference(claim.a, claim.b)
    text = f"{head}less{tail.partition(':')[0]}" if verb else plain
    if claim.less:
        text += f", less the same of {name_difference(*claim.less)}"
    return text.replace("`", "").strip()


def key_of(claim: Claim) -> Key:
    """What is compared, whatever the measure."""
    return claim.study, claim.a, claim.b, *claim.less


def join_names(names: Sequence[str]) -> str:
    """One name of a pair whose claims call it differently.

    What their names have in common behind the last colon in which they differ, as a
    claim may have its measure before one; the shortest where they have nothing.
    """
    parts = [name.split(": ")[::-1] for name in names]
    common = itertools.takewhile(
        lambda each: len(set(each)) == 1, zip(*parts, strict=False)
    )
    return ": ".join([each[0] for each in common][::-1]) or min(names, key=len)


def name_pairs(claims: Sequence[Claim]) -> dict[Key, str]:
    """The name of every pair of several claims."""
    names: dict[Key, list[str]] = {}
    for claim in claims:
        names.setdefault(key_of(claim), []).append(name_pair(claim))
    return {key: join_names(each) for key, each in names.items()}


def choose(claims: Sequence[Claim], numbers: Mapping[str, Number]) -> list[Claim]:
    """The claims that are differences, but for measures of fewer than `FEWEST`."""
    paired = [claim for claim in claims if numbers[claim.id].paired]
    counts = Counter(numbers[claim.id].title for claim in paired)
    return [c for c in paired if counts[numbers[c.id].title] >= FEWEST]


def list_panels(
    rows: Sequence[Key], claims: Sequence[Claim], numbers: Mapping[str, Number]
) -> list[Panel]:
    """A panel for each measure, in the order of the claims."""
    found: dict[str, dict[Key, Difference]] = {}
    better: dict[str, int] = {}
    for claim in claims:
        title, paired = numbers[claim.id].title, numbers[claim.id].paired
        _, measure = find_measure(claim.measure)
        assert paired is not None  # see `choose`
        cell = show_difference(paired, measure)
        assert cell is not None  # a claim has pairs, or is refused
        found.setdefault(title, {})[key_of(claim)] = cell
        better[title] = measure.better
    return [
        Panel(title, better[title], [cells.get(row) for row in rows])
        for title, cells in found.items()
    ]


def describe(names: Sequence[str], panels: Sequence[Panel]) -> str:
    """All that the picture says."""
    lines = []
    for title, better, cells in panels:
        lines.append(f"{title} ({better:+d})")
        for name, cell in zip(names, cells, strict=True):
            if cell is not None:
                half = "one pair" if math.isnan(cell.half) else f"{cell.half:.4g}"
                lines.append(f"{name}: {cell.mean:+.4g} ± {half} ({cell.gain:+d})")
    return "\n".join(lines)


def draw_claims(claims: Sequence[Claim], numbers: Mapping[str, Number]) -> Drawing:
    """The picture of a section's differences, see `choose`.

    Args:
      claims: that stand.
      numbers: of these, by id.

    Raises:
      UserError: no measure has several pairs.
    """
    chosen = choose(claims, numbers)
    names = name_pairs(chosen)
    panels = list_panels(list(names), chosen, numbers)
    rows = list(names.values())
    if not panels:
        raise UserError(
            f"claims: the section of {claims[0].study} has picture = true; allowed: "
            "where a measure has several pairs"
        )
    return Drawing(describe(rows, panels), lambda: draw_forest(rows, panels))
