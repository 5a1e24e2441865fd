"""The pictures of clients' accuracies, by hand."""

import numpy as np

from fedmoe_jax.report.client_figures import client_pictures
from fedmoe_jax.report.runs import group_runs

from .fake_runs import ARRAYS, ROWS, make_row, make_run

MORE = ARRAYS | {"client_accuracy": np.array([0.5, 0.7, 0.9])}
DENSE = [row | {"expert_load": [1.0]} for row in ROWS]


def pictures_of(*runs):
    found = list(client_pictures(group_runs(runs)))
    return {picture.name: picture.figure.axes[0] for picture in found}


def names_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_client_pictures_of_one_strategy_are_by_tier_and_capacity(tmp_path):
    found = pictures_of(make_run(tmp_path, arrays=MORE))
    assert list(found) == ["client_accuracy", "accuracy_by_capacity"]
    bars = found["client_accuracy"].containers
    assert [bar.get_label() for bar in bars] == ["phone", "desk"]
    assert [sum(b.get_height() for b in bar) for bar in bars] == [1, 2]
    rows = found["accuracy_by_capacity"]
    assert names_of(rows) == ["holds 1 (n = 1)", "holds 2 (n = 2)"]
    dots = [line.get_xdata().tolist() for line in rows.lines[::2]]
    np.testing.assert_allclose(dots[0], [50])
    np.testing.assert_allclose(dots[1], [70, 90])


def test_client_pictures_pool_the_seeds_of_one_strategy(tmp_path):
    seeds = [make_run(tmp_path, arrays=MORE, seed=seed) for seed in (0, 1)]
    rows = pictures_of(*seeds)["accuracy_by_capacity"]
    assert names_of(rows) == ["holds 1 (n = 2)", "holds 2 (n = 4)"]


def test_client_pictures_have_every_client_with_an_accuracy(tmp_path):
    """The first has not taken part, but the server's model serves it."""
    late = MORE | {"participation": np.array([0, 4, 4])}
    late["client_accuracy"] = np.array([0.5, np.nan, 0.9])
    found = pictures_of(make_run(tmp_path, arrays=late))
    (bars, others) = found["client_accuracy"].containers
    assert sum(b.get_height() for b in (*bars, *others)) == 2
    late["client_accuracy"] = np.array([np.nan, 0.7, 0.9])
    found = pictures_of(make_run(tmp_path, arrays=late))
    assert "accuracy_by_capacity" not in found  # of one capacity alone


def test_client_pictures_compare_strategies(tmp_path):
    better = MORE | {"client_accuracy": MORE["client_accuracy"] + 0.05}
    runs = [
        make_run(tmp_path, arrays=MORE),
        make_run(tmp_path, "older"),
        make_run(tmp_path, "random", arrays=better),
        make_run(tmp_path, "fedavg", DENSE, MORE),
    ]
    found = pictures_of(*runs)
    rows = found["client_accuracy"]
    assert names_of(rows) == ["greedy", "older", "random", "fedavg"]
    dots = [line for line in rows.lines if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in dots] == [0, 2, 3]
    means = found["accuracy_by_capacity"]
    assert means.get_xlabel() == "Experts a client can hold"
    # Means of clients 1 and 2; a dense model has no experts to hold.
    assert [text.get_text() for text in means.texts] == ["greedy", "random"]
    np.testing.assert_allclose(means.lines[0].get_ydata(), [50, 80])
    assert means.lines[0].get_xdata().tolist() == [1, 2]


def test_client_pictures_of_pooled_data_know_no_devices(tmp_path):
    one = {name: ARRAYS[name][:1] for name in ("capacity", "tier", "participation")}
    found = pictures_of(make_run(tmp_path, arrays=MORE | one))
    assert list(found) == ["client_accuracy"]
    (bars,) = found["client_accuracy"].containers
    assert bars.get_label() == "all"


def test_client_pictures_need_a_finished_run_with_accuracies(tmp_path):
    early = make_run(tmp_path, rows=[make_row(1)], arrays={})
    assert pictures_of(early) == pictures_of(make_run(tmp_path)) == {}
    assert pictures_of(early, make_run(tmp_path, "random")) == {}
