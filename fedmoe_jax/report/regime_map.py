"""Where a mixture pays: the best mixture beside the best control in every regime."""

from collections.abc import Iterator, Sequence

from fedmoe_jax.report.cells import NO_DATA, Cell
from fedmoe_jax.report.duels import Duel, duel_cell, hold_duel, phrase_duel
from fedmoe_jax.report.figures import Picture, has_bits, title_final
from fedmoe_jax.report.map_plot import Verdict, draw_map
from fedmoe_jax.report.paired import final_measures, seeds_of
from fedmoe_jax.report.regimes import split_regimes
from fedmoe_jax.report.runs import NAN, Run, name_runs, num_experts
from fedmoe_jax.report.sheets import Section, Sheet

TITLE = "Where a mixture pays"
ABOUT = (
    "In every regime, which is what the clients and their data are like, the mixture "
    "with the best mean less the control with the best mean, over the seeds that both "
    "have, ± half-width of its 95 % t-interval; bold, with the better one first, where "
    "the difference exceeds it, else above 0 where the mixture is better. Both are "
    "chosen by the numbers that are compared. A control trains a dense model. "
    "Strategies that found one group in every seed train one network and take no part, "
    "nor do references, which know what no server could."
)

NOTHING = Cell(NO_DATA, NAN)
CAPTION = (
    "In every regime the best mixture and the best control: above who leads, below by "
    "how much, with the 95 % t-interval. Blue: a mixture leads; orange: a dense model "
    "does; the stronger, the more. Grey: the difference, above 0 where the mixture is "
    "better, can be chance."
)

Regimes = dict[str, dict[str, Duel | None]]  # by regime and key of the measure


def name_measures(runs: Sequence[Run]) -> dict[str, str]:
    """Keys and names of the measures that the picture of final numbers has."""
    bits = has_bits(runs)
    names = {key: title_final(m, bits) for key, m in final_measures(runs).items()}
    return {key: name for key, name in names.items() if name}


def find_duels(runs: Sequence[Run]) -> Regimes:
    """The duel of each measure in each regime, None where it has none.

    Empty below two regimes with a duel; measures without any are left out.

    Args:
      runs: of any labels, seeds and regimes.
    """
    known, regimes = final_measures(runs), {}
    for regime, group in split_regimes(runs).items():
        rivals = [run for run in group if not run.summary.get("reference")]
        controls = {run.label for run in name_runs(rivals) if num_experts(run) == 1}
        seeds = seeds_of(rivals)
        duels = {
            key: hold_duel(seeds, controls, key, known[key])
            for key in name_measures(runs)
        }
        if any(duels.values()):
            regimes[regime] = duels
    found = {key for duels in regimes.values() for key, duel in duels.items() if duel}
    return {
        regime: {key: duel for key, duel in duels.items() if key in found}
        for regime, duels in regimes.items()
        if len(regimes) > 1
    }


def map_section(runs: Sequence[Run]) -> Section | None:
    """The duels as a table; None where there are none."""
    regimes, measures = find_duels(runs), final_measures(runs)
    if not regimes:
        return None
    keys = list(next(iter(regimes.values())))
    show = lambda duel, key: duel_cell(duel, measures[key].digits)
    rows = {
        regime: [show(duel, key) if duel else NOTHING for key, duel in duels.items()]
        for regime, duels in regimes.items()
    }
    heads = ("Regime", *(measures[key].title for key in keys))
    return Section(TITLE, ABOUT, (Sheet("", heads, rows),))


def judge(duel: Duel, digits: int, unit: str = "") -> Verdict:
    """A duel as a cell of the picture, its leader first; see `phrase_duel`."""
    first, margin, word, second = phrase_duel(duel, digits, unit)
    lines = first, f"{margin} {word} {second}"
    return Verdict(duel.lead, abs(duel.paired.mean), lines, unit)


def map_picture(runs: Sequence[Run]) -> Iterator[Picture]:
    """The duels as a picture, a row per regime; none where there are none."""
    regimes, measures = find_duels(runs), final_measures(runs)
    if not regimes:
        return
    names = name_measures(runs)
    columns = [names[key] for key in next(iter(regimes.values()))]
    cells = [
        [duel and judge(duel, measures[key].digits) for key, duel in duels.items()]
        for duels in regimes.values()
    ]
    yield Picture("map", CAPTION, draw_map(list(regimes), columns, cells))
