"""Tables of attacks: the columns that runs have, means over seeds."""

from fedmoe_jax.attack.membership import NAN
from fedmoe_jax.attack.plots import ACCURACY, Point
from fedmoe_jax.attack.tables import (
    SECTIONS,
    UTILITY,
    draw_pictures,
    make_section,
    percent,
    save_png,
)


def test_make_section_has_the_columns_that_any_run_has():
    groups = {
        "greedy": [{"final_global_accuracy": 0.5}, {"final_global_accuracy": 0.7}],
        "local": [{"final_global_accuracy": 0.25, "epsilon": NAN}],
    }
    section = make_section("Utility", "About.", UTILITY, groups)
    (sheet,) = section.sheets
    assert sheet.heads == ["Strategy", "Global %"]
    texts = {label: [cell.text for cell in row] for label, row in sheet.rows.items()}
    assert texts["local"] == ["25.0 (1 seed)"]
    assert texts["greedy"][0].startswith("60.0 ± 127")


def test_percent_by_hand():
    assert percent("a", "A %") == ("a", "A %", 100.0, 1)


def test_keys_and_titles_are_there_once():
    columns = [column for *_, columns in SECTIONS for column in columns]
    assert len({c.key for c in columns}) == len({c.title for c in columns})
    assert len({c.key for c in columns}) == len(columns)


def test_draw_pictures_has_those_that_there_are_numbers_for(tmp_path):
    plain = Point("greedy", "none", {ACCURACY: 0.5, "pairs_auc": 0.7})
    private = Point("greedy", "flip", {ACCURACY: 0.4, "pairs_auc": 0.5, "epsilon": 2.0})
    names = lambda points: [picture.name for picture in draw_pictures(points)]
    assert names([plain, private]) == ["attacks", "epsilons"]
    assert names([plain]) == ["attacks"]
    assert names([Point("local", "none", {ACCURACY: 0.5})]) == []
    assert save_png(tmp_path, "epsilons", b"png") == "epsilons"
    assert (tmp_path / "epsilons.png").read_bytes() == b"png"
