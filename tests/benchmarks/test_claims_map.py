"""The map of stored studies: the best mixture beside the best control, by hand."""

import pytest

from benchmarks.claims_map import (
    draw_places,
    find_place,
    read_map,
    show_place,
    tabulate_map,
)
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
    sheet = tabulate_map(read_map(table, studies))
    assert sheet.heads == ["", "Global %", "Load CV"]
    cells = {text: row[0] for text, row in sheet.rows.items()}
    assert cells["rotated"].text == "`greedy` 12.0 ± 5.0 over `dense`"
    assert cells["skewed"].text == "`dense` 12.0 ± 5.0 over `greedy`"
    assert cells["mixed"].text == "`greedy` +0.5 ± 19.1 against `dense`"
    assert [cell.bold for cell in cells.values()] == [True, True, False]
    assert sheet.rows["rotated"][1].text == "`greedy` 0.12 ± 0.05 over `dense`"


def test_references_take_no_part():
    table = {"controls": ["dense"], "references": ["greedy"]}
    place = find_place(LEADS, table, "global")
    assert show_place(place).text.startswith("`random` +3.0")


def test_a_map_needs_both_kinds():
    with pytest.raises(UserError, match="tiny has the rows greedy.*allowed: some of x"):
        find_place(LEADS, {"controls": ["x"]}, "global")


def test_a_column_takes_the_first_measure_that_a_study_has():
    bits = {0: {"final_global_bits": 2.0}, 1: {"final_global_bits": 2.2}}
    less = {0: {"final_global_bits": 2.4}, 1: {"final_global_bits": 2.6}}
    seeds = {"greedy": bits, "dense": less}
    text = Study("text", seeds, dict.fromkeys(seeds, "tuned"), {}, [])
    table = {
        "controls": ["dense"],
        "measures": [["Global", "global", "final_global_bits"], "personal"],
        "rows": [["a", "rotated"], ["t", "languages"]],
    }
    sheet = tabulate_map(read_map(table, {"a": LEADS, "t": text}))
    assert sheet.heads == ["", "Global", "Personal %"]
    assert sheet.rows["rotated"][0].text == "`greedy` 12.0 ± 5.0 over `dense`"
    cell = sheet.rows["languages"][0].text
    assert cell == "`greedy` 0.400 ± 0.000 bits over `dense`"
    assert {row[1].text for row in sheet.rows.values()} == {"no data"}


def test_a_picture_knows_the_numbers_that_it_shows():
    table = {
        "controls": ["dense", "alone"],
        "measures": ["global"],
        "rows": [["a", "rotated"]],
    }
    drawing = draw_places(read_map(table, {"a": LEADS}))
    assert drawing.note.splitlines() == [
        " | Global %",
        "rotated | `greedy` 12.0 ± 5.0 over `dense`",
    ]
    (axes,) = drawing.draw().axes
    assert axes.texts[0].get_text() == "greedy"


def test_other_words_stand_for_parts_of_names():
    table = {
        "controls": ["dense", "alone"],
        "measures": ["global"],
        "rows": [["a", "rotated"]],
        "names": [["greedy", "by fitness"], ["dense", "one network"]],
    }
    (cell,) = tabulate_map(read_map(table, {"a": LEADS})).rows["rotated"]
    assert cell.text == "`by fitness` 12.0 ± 5.0 over `one network`"
