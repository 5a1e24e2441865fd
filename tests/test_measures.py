"""Measures: one row of a table makes number, column, definition and curve."""

import csv
import json
from pathlib import Path

import pytest

from fedmoe_jax.measures import (
    MEASURES,
    PERPLEXITY,
    check_measure,
    evaluated_fields,
    pack_measures,
    running_fields,
    unpack_measures,
)
from fedmoe_jax.options import FINAL, LAST, MAX, MEAN, TOTAL, Curve, Measure, UserError
from fedmoe_jax.report import page, runs, summary, tables
from fedmoe_jax.train.writers import open_metrics

CONFIG = {
    "strategy": "greedy",
    "seed": 0,
    "num_clients": 3,
    "cohort_size": 3,
    "num_experts": 2,
    "data": {"name": "digits"},
    "partition": {"kind": "iid"},
    "devices": {"tiers": ["phone"], "deadline": 10.0, "buffer": 0.1},
    "weights": {"usage": 0.5},
    "fitness": {"rate": 0.3, "exploration": 0.0},
}
SURPRISE = Measure(
    "surprise",
    MEAN,
    "Surprise <bits>",
    "bits by which a label surprises the clients",
    better=-1,
    digits=2,
    curve=Curve("Surprise (bits)", "It should fall."),
)


@pytest.fixture
def own(monkeypatch):
    """The table with one row from outside."""
    monkeypatch.setitem(MEASURES, "mean_surprise", SURPRISE)
    return dict(MEASURES)


def make_folder(tmp_path, name, table, **changes):
    """A finished run that has the field of the row from outside."""
    folder = tmp_path / name
    folder.mkdir()
    rows = [
        {"round": n, "seconds": 0.1, "examples": 8, "wasted_share": 0.0}
        | {"surprise": x}
        for n, x in enumerate((3.0, 2.0, None, 1.5), start=1)
    ]
    with open_metrics(folder, done=0, tensorboard=False) as write:
        for row in rows:
            write(row)
    made = summary.make_summary(rows, {}, table, ())
    made["measures"] = pack_measures(table)
    made["made_by"] = {"commit": None, "dirty": True}
    (folder / "summary.json").write_text(json.dumps(made))
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_measures_from_outside_are_numbers_of_the_summary(tmp_path, own):
    folder = make_folder(tmp_path, "run", own)
    made = json.loads((folder / "summary.json").read_text())
    assert made["mean_surprise"] == pytest.approx(6.5 / 3)  # null does not count
    assert made["measures"]["mean_surprise"]["title"] == SURPRISE.title


def test_measures_of_the_runs_are_what_a_report_reads(tmp_path):
    own = MEASURES | {"mean_surprise": SURPRISE}  # nothing has added it to the table
    folder = make_folder(tmp_path, "run", own)
    other = make_folder(tmp_path, "other", MEASURES, strategy="random")
    made = [runs.load_run(other), runs.load_run(folder)]
    assert "mean_surprise" not in made[0].measures
    columns, rows = tables.table(made)
    titles = [column.title for column in columns]
    assert titles.index("Starved experts") + 1 == titles.index("Surprise <bits>")
    # The other run's rows have the field, too.
    at = titles.index("Surprise <bits>")
    assert [rows[label][at].text for label in rows] == ["2.17 (1 seed)"] * 2
    tables.write_runs_csv(tmp_path / "runs.csv", made)
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert [record["mean_surprise"] for record in records] == ["2.166666667"] * 2
    assert not any(name.startswith("measures") for name in records[0])
    text = page.write_report(tmp_path / "out", made, "c").read_text(encoding="utf-8")
    assert "<th>Surprise &lt;bits&gt;</th>" in text
    assert "<b>Surprise &lt;bits&gt;</b>: bits by which a label surprises" in text
    assert (tmp_path / "out" / "figures" / "surprise.png").exists()
    assert "It should fall." in text


def test_measure_rows_by_hand():
    rows = [{"round": n, "x": x} for n, x in ((1, 4), (2, 1.0), (3, None), (4, 2))]
    rows.insert(2, {"round": 2, "y": 3.0})
    number = lambda over, **more: summary.measure_rows(rows, Measure("x", over, **more))
    assert number(TOTAL) == 7 and number(MEAN) == pytest.approx(7 / 3)
    assert number(MAX) == 4 and number(LAST) == 2
    assert number(FINAL) == 2  # of the last quarter
    assert number(TOTAL, plus=("y",)) == 10 and number(TOTAL, unit=2.0) == 3.5
    assert number(TOTAL, per=("x", "y")) == 0.7
    assert number(TOTAL, per=("z",)) is None
    assert summary.measure_rows(rows, Measure("z", MEAN)) is None


def test_measure_rows_of_vectors_have_no_number():
    rows = [{"round": 1, "x": [1.0, 2.0]}]
    assert summary.measure_rows(rows, Measure("x", MEAN)) is None


# More groups are no better, nor more units or likelier masks at equal bytes.
NO_BETTER = {"final_groups_found", "mean_kept_share", "mean_kept_spread"}
NO_BETTER |= {"mean_mask_overlap", "epsilon"}


def test_measures_with_a_column_have_a_definition_and_a_sense():
    for key, measure in MEASURES.items():
        check_measure(key, measure)
        if measure.title:
            neither = key in NO_BETTER
            assert measure.about and bool(measure.better) != neither, key
            # One is made of bits, one of the config.
            assert measure.over or key in (PERPLEXITY, "epsilon")


def test_pack_measures_survives_json():
    table = MEASURES | {"mean_surprise": SURPRISE}
    tree = json.loads(json.dumps(pack_measures(table)))
    assert unpack_measures(tree, Path("summary.json")) == table
    assert tree["drift_alarms"] == {"field": "drift_alarms", "over": "total"}


@pytest.mark.parametrize(
    "tree",
    [
        ["a"],
        {"a": 3},
        {"a": {"fields": "b"}},
        {"a": {}},
        {"a": {"field": 3}},
        {"a": {"field": "b", "over": "median"}},
        {"a": {"field": "b", "title": ["c"]}},
        {"a": {"field": "b", "unit": "c"}},
        {"a": {"field": "b", "plus": 3}},
        {"a": {"field": "b", "trivial": "c"}},
        {"a": {"field": "b", "curve": 3}},
        {"a": {"field": "b", "curve": {"label": "c", "caption": 3}}},
    ],
)
def test_unpack_measures_refuses_a_damaged_table_in_one_line(tree):
    with pytest.raises(UserError, match="^run/summary.json is damaged: measures"):
        unpack_measures(tree, Path("run/summary.json"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"mean_x": Measure("x", "median")},
            "measure mean_x: over='median'; allowed: '', 'final', 'mean'",
        ),
        ({"mean_x": Measure("x", MEAN, better=2)}, "better=2; allowed: -1, 0, 1"),
    ],
)
def test_check_measure_refuses_rows_that_are_not_allowed(row, message):
    (item,) = row.items()
    with pytest.raises(UserError, match=message):
        check_measure(*item)


def test_join_measures_of_several_runs_keeps_their_order():
    rows = lambda *keys: {key: Measure(key, MEAN) for key in keys}
    made = [
        runs.Run({}, [], {}, {}, Path(), "a", rows("x", "y")),
        runs.Run({}, [], {}, {}, Path(), "b", rows("y", "z", "x")),
    ]
    assert list(runs.join_measures(made)) == ["x", "y", "z"]


def test_running_fields_have_their_sums_in_every_row(tmp_path, monkeypatch):
    row = Measure("surprise", TOTAL, running=True)
    monkeypatch.setitem(MEASURES, "total_surprise", row)
    with open_metrics(tmp_path, done=0, tensorboard=False) as write:
        for number in (1, 2, 3):
            write({"round": number, "surprise": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["total_surprise"] for line in lines] == [0.5, 1.0, 1.5]


def test_running_fields_and_evaluated_fields_by_hand():
    table = {
        "total": Measure("x", TOTAL, running=True),
        "mean": Measure("x", MEAN),
        "final": Measure("y", FINAL, evaluated=True),
        "other": Measure("z", TOTAL, running=True, plus=("w",)),
    }
    assert running_fields(table) == ("x", "z")
    assert evaluated_fields(table) == ("y",)
