"""What tuning has tried, as a file and as curves."""

import csv
import math

from fedmoe_jax.report.tuning import (
    Trial,
    draw_tuning,
    list_curves,
    split_rate,
    write_tuning_csv,
)

SERVER = "server.optimizer=fedadam,server.learning_rate=0.01"


def make_trial(*values):
    return Trial(*values, made_by={"commit": "a1b2", "dirty": False})


TRIALS = [
    make_trial("greedy", "client.learning_rate=0.05", 2, 0.5),
    make_trial("greedy", "client.learning_rate=0.01", 2, 0.25),
    make_trial("greedy", f"client.learning_rate=0.01,{SERVER}", 2, 0.75),
    make_trial("greedy", "client.learning_rate=0.1", 2, math.nan),
    make_trial("random", "client.learning_rate=0.01", 2, 0.125),
]


def test_split_rate():
    assert split_rate("client.learning_rate=0.05") == (0.05, "")
    assert split_rate(f"client.learning_rate=1e-3,{SERVER}") == (0.001, SERVER)


def test_curves_are_sorted_by_rate_and_leave_out_what_diverged():
    assert list_curves(TRIALS, "greedy") == {
        "as configured, 2 rounds": [(0.01, 0.25), (0.05, 0.5)],
        f"{SERVER}, 2 rounds": [(0.01, 0.75)],
    }


def test_every_trial_is_a_row(tmp_path):
    write_tuning_csv(tmp_path / "tuning.csv", TRIALS, "global_accuracy")
    with (tmp_path / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["global_accuracy"] for row in rows] == [
        "0.5",
        "0.25",
        "0.75",
        "",
        "0.125",
    ]
    assert rows[2]["change"] == TRIALS[2].change
    assert {(row["made_by.commit"], row["made_by.dirty"]) for row in rows} == {
        ("a1b2", "False")
    }


def test_a_curve_has_the_colour_of_the_legend_in_every_panel():
    other = [make_trial("random", f"client.learning_rate=0.01,{SERVER}", 2, 0.5)]
    figure = draw_tuning([*TRIALS, *other, *TRIALS[-1:]], "global_accuracy")
    assert [line.get_color() for line in figure.axes[0].lines] == ["C0", "C1"]
    figure = draw_tuning([*TRIALS[:4], *other, *TRIALS[-1:]], "global_accuracy")
    assert [line.get_color() for line in figure.axes[1].lines] == ["C1", "C0"]


def test_every_strategy_has_a_panel():
    figure = draw_tuning(TRIALS, "global_accuracy")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["greedy", "random"]
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels == ["0.01", "0.05", "0.1"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 0, 0]
