"""The map of stored studies: the best mixture beside the best control, by hand."""

import pytest

from benchmarks.claims_map import show_duel, tabulate_map
from benchmarks.studies import Study
from fedmoe_jax.options import UserError


def make_study(**rows):
    """Global accuracy of each row by seed, and load CV, which is 1 less that."""
    seeds = {
        label: {
            seed: {"final_global_accuracy": value, "mean_load_cv": 1 - value}
            for seed, value in enumerate(values)
        }
        for label, values in rows.items()
    }
    return Study("tiny", seeds, dict.fromkeys(rows, "tuned"), {}, [])


LEADS = make_study(
    greedy=(0.50, 0.54, 0.58), random=(0.45, 0.45, 0.45), dense=(0.40, 0.42, 0.44)
)
TRAILS = make_study(greedy=(0.40, 0.42, 0.44), dense=(0.50, 0.54, 0.58), alone=(0.1,))
LEVEL = make_study(greedy=(0.40, 0.44), dense=(0.41, 0.42))


def test_a_map_names_the_winner_and_its_margin():
    studies = {"a": LEADS, "b": TRAILS, "c": LEVEL}
    table = {
        "controls": ["dense", "alone"],
        "measures": ["global", "mean_load_cv"],  # of which less is better
        "rows": [["a", "rotated"], ["b", "skewed"], ["c", "mixed"]],
    }
    sheet = tabulate_map(table, studies)
    assert sheet.heads == ["", "Global %", "Load CV"]
    cells = {text: row[0] for text, row in sheet.rows.items()}
    assert cells["rotated"].text == "`greedy` 12.0 ± 5.0 over `dense`"
    assert cells["skewed"].text == "`dense` 12.0 ± 5.0 over `greedy`"
    assert cells["mixed"].text == "`greedy` +0.5 ± 19.1 less `dense`"
    assert [cell.bold for cell in cells.values()] == [True, True, False]
    assert sheet.rows["rotated"][1].text == "`greedy` 0.12 ± 0.05 over `dense`"


def test_references_take_no_part():
    table = {"controls": ["dense"], "references": ["greedy"]}
    assert show_duel(LEADS, table, "global").text.startswith("`random` +3.0")


def test_a_map_needs_both_kinds():
    with pytest.raises(UserError, match="tiny has the rows greedy.*allowed: some of x"):
        show_duel(LEADS, {"controls": ["x"]}, "global")
