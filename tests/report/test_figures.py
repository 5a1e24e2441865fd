"""The pictures of a report: which there are, and the arrays that they show."""

import numpy as np
import pytest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import FINAL, Measure
from fedmoe_jax.report import figures
from fedmoe_jax.report.runs import group_runs

from .fake_runs import ARRAYS, ROWS, make_row, make_run, make_text_run

FINAL_GLOBAL = MEASURES["final_global_accuracy"]


def names_of(pictures):
    return [picture.name for picture in pictures]


def curve_names(*runs):
    return names_of(figures.curve_pictures(group_runs(runs)))


def test_measure_series_by_hand(tmp_path):
    rows = [make_row(3, global_accuracy=0.1), make_row(4, global_accuracy=0.5)]
    seeds = [make_run(tmp_path), make_run(tmp_path, rows=rows, seed=1)]
    (line,) = figures.measure_series(2, "name", seeds, FINAL_GLOBAL)
    assert (line.place, line.label) == (2, "name")
    assert line.rounds.tolist() == [2, 3, 4]
    expected = [[30, np.nan, 42], [np.nan, 10, 50]]
    np.testing.assert_allclose(line.values, expected)


def test_measure_series_adds_fields_and_divides_by_the_unit(tmp_path):
    (line,) = figures.measure_series(
        0, "", [make_run(tmp_path)], Measure("bytes_up", plus=("bytes_down",), unit=2e6)
    )
    assert line.values.tolist() == [[3, 3, 3, 3]]


def test_measure_series_has_no_rounds_without_a_number(tmp_path):
    rows = [{"round": 1, "x": None}, {"round": 2, "x": np.nan}, {"round": 3, "x": 5}]
    run = make_run(tmp_path, rows=rows)
    (line,) = figures.measure_series(0, "", [run], Measure("x"))
    assert line.rounds.tolist() == [3] and line.values.tolist() == [[5]]
    for few in ([], rows[:1], rows[:2]):
        some = [run._replace(rows=few)]
        assert figures.measure_series(0, "", some, Measure("x")) == []


def test_find_chance_needs_a_finished_run(tmp_path):
    early, done = make_run(tmp_path, arrays={}), make_run(tmp_path)
    assert figures.find_chance([early]) is None
    assert figures.find_chance([early, done]) == (50, "chance")


def test_curves_of_bits_have_their_limit(tmp_path):
    groups = {"greedy": [make_text_run(tmp_path)]}
    made = {picture.name: picture for picture in figures.curve_pictures(groups)}
    for name in ("global_bits", "personal_bits"):
        (axes,) = made[name].figure.axes
        assert "limit" in [text.get_text() for text in axes.texts]
        assert [1.75, 1.75] in [list(line.get_ydata()) for line in axes.lines]
        assert axes.get_ylim()[0] < 1.75
    (axes,) = made["capacity_error"].figure.axes
    assert "limit" not in [text.get_text() for text in axes.texts]


def test_curve_pictures_of_one_strategy_share_its_accuracies(tmp_path):
    run = make_run(tmp_path)
    assert curve_names(run) == ["accuracy", "capacity_error"]
    both = curve_names(run, make_run(tmp_path, "random"))
    assert both == ["global_accuracy", "personal_accuracy", "capacity_error"]
    assert curve_names(make_run(tmp_path, rows=[])) == []


def test_curve_pictures_say_what_drifted_means(tmp_path):
    drifted = [*ROWS[:3], ROWS[3] | {"drifted_accuracy": 0.2}]
    captions = []
    for rows in (ROWS, drifted):
        run = make_run(tmp_path, rows=rows)
        captions.append(next(figures.curve_pictures({"greedy": [run]})).caption)
    assert captions[1].startswith(captions[0])
    assert captions[1].removeprefix(captions[0]).startswith(" Drifted: ")


@pytest.mark.parametrize(
    "changes", [{"capacity_error": 0.5}, {"expert_load": [1.0]}], ids=["same", "dense"]
)
def test_curve_pictures_leave_out_what_says_nothing(tmp_path, changes):
    rows = [row | changes for row in ROWS]
    assert curve_names(make_run(tmp_path, rows=rows)) == ["accuracy"]


def test_final_picture_by_hand(tmp_path):
    better = [ROWS[0], ROWS[3] | {"global_accuracy": 0.52}]
    runs = [
        make_run(tmp_path),
        make_run(tmp_path, rows=better, seed=1),
        make_run(tmp_path, "random", ROWS[:1]),
    ]
    (found,) = figures.final_picture(group_runs(runs))
    left, right = found.figure.axes
    assert [left.get_xlabel(), right.get_xlabel()] == ["Global (%)", "Personal (%)"]
    seeds = [line.get_xdata() for line in left.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(seeds[0], [42, 52])
    assert len(seeds) == 2 and not len(seeds[1])  # nothing is known of the other yet
    # 47 and 12.7062 * 7.07107 / sqrt(2): t(0.975, 1) is 12.7062.
    interval = left.containers[0].lines[2][0].get_segments()[0][:, 0]
    np.testing.assert_allclose(interval, [47 - 63.531, 47 + 63.531], atol=1e-3)


def test_final_picture_leaves_a_gap_where_a_run_lacks_a_measure(tmp_path):
    night = Measure("night", FINAL, "Night", "share", scale=100, line="Night")
    told = [row | {"night": 0.5} for row in ROWS]
    more = {"nights": night}
    one, other = make_run(tmp_path, rows=told), make_run(tmp_path, "random")
    groups = group_runs([one._replace(measures=one.measures | more), other])
    (found,) = figures.final_picture(groups)
    axes = {axis.get_xlabel(): axis for axis in found.figure.axes}
    drawn = [x.get_xdata() for x in axes["Night (%)"].lines if x.get_marker() == "o"]
    assert list(drawn[0]) == [50] and not len(drawn[1])


def test_final_picture_of_text_shows_bits(tmp_path):
    rows = [row | {"global_bits": 2.5, "unseen_bits": 3.0} for row in ROWS]
    (found,) = figures.final_picture({"greedy": [make_run(tmp_path, rows=rows)]})
    names = [axis.get_xlabel() for axis in found.figure.axes]
    assert names == ["Global", "Unseen clients"] and "bits" in found.caption
    assert list(found.figure.axes[0].lines[0].get_xdata()) == [2.5]


def test_final_picture_needs_an_evaluation(tmp_path):
    early = make_run(tmp_path, rows=ROWS[:1])
    assert list(figures.final_picture({"greedy": [early]})) == []


def test_population_pictures_of_pooled_data_show_no_devices(tmp_path):
    run = make_run(tmp_path)
    assert names_of(figures.population_pictures(run)) == ["partition", "capacity"]
    pooled = run._replace(arrays=ARRAYS | {"capacity": np.array([2])})
    assert names_of(figures.population_pictures(pooled)) == ["partition"]


def test_population_pictures_name_tiers_by_the_config_of_older_runs(tmp_path):
    older = {k: v for k, v in ARRAYS.items() if k != "tier_names"}
    for arrays, tiers in ((ARRAYS, ["phone", "desk"]), (older, ["phone", "laptop"])):
        _, found = figures.population_pictures(make_run(tmp_path, arrays=arrays))
        legend = found.figure.axes[0].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == tiers


def test_add_layer_leaves_several_layers_alone():
    values = np.arange(6).reshape(3, 2)
    assert figures.add_layer(values, 1).tolist() == values[:, None].tolist()
    assert figures.add_layer(values, 0).tolist() == [values.tolist()]
    layers = np.zeros((3, 4, 2))
    assert figures.add_layer(layers, 1) is layers


def test_run_pictures_only_where_there_are_experts(tmp_path):
    run = make_run(tmp_path)
    alignment = ["specialisation", "pairs"]
    assert names_of(figures.run_pictures(run)) == ["load", *alignment]
    early = run._replace(arrays={})
    assert names_of(figures.run_pictures(early)) == ["load"]
    dense = run._replace(rows=[row | {"expert_load": [1.0]} for row in ROWS])
    assert names_of(figures.run_pictures(dense)) == []
    assert names_of(figures.run_pictures(run._replace(rows=[]))) == []


def test_run_pictures_draw_a_curve_for_each_expert_of_each_layer(tmp_path):
    load = [[1.0, 1.0], [1.0, 3.0]]  # G = 2, E = 2
    alone = [[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]
    rows = [make_row(n, expert_load=load) for n in (1, 2, 3)]
    for row, values in zip(rows[1:], alone, strict=True):
        row["expert_accuracy"] = values
    run = make_run(tmp_path, rows=rows, arrays={})
    pictures = {picture.name: picture for picture in figures.run_pictures(run)}
    (axes,) = pictures["expert_accuracy"].figure.axes
    names = [text.get_text() for text in axes.texts]
    assert names == [f"layer {g} expert {e}" for g in (0, 1) for e in (0, 1)]
    drawn = [line for line in axes.lines if list(line.get_xdata()) == [2, 3]]
    values = [line.get_ydata() for line in drawn[:4]]
    np.testing.assert_allclose(values, [[10, 50], [20, 60], [30, 70], [40, 80]])
    shares = pictures["load"].figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, np.repeat([[50], [50], [25], [75]], 3, axis=1))


def test_join_classes_by_hand():
    """Two experts, two groups of two classes, one of them without a test image."""
    shares = np.array([[[1.0, 0.5, 0.25, 0.0], [0.0, 0.5, 0.75, 0.0]]])
    np.testing.assert_allclose(
        figures.join_classes(shares, 2), [[[0.75, 0.25], [0.25, 0.75]]]
    )


def test_share_rounds_by_hand(tmp_path):
    """Three clients of two groups of two classes, 4 rounds, two experts."""
    arrays = {
        "label_counts": np.array([[3, 1, 0, 0], [0, 0, 9, 0], [0, 5, 0, 0]]),
        "group_names": np.array(["one", "two"]),
        "times_held": np.array([[4, 0], [1, 3], [2, 1]]),
    }
    run = make_run(tmp_path)._replace(arrays=arrays)
    assert len(run.rows) == 4
    expected = [[[6 / 8, 1 / 4], [1 / 8, 3 / 4]]]
    np.testing.assert_allclose(figures.share_rounds(run), expected)


def test_specialisation_is_of_groups_where_there_are_any(tmp_path):
    run = make_run(tmp_path)
    grouped = run._replace(arrays=run.arrays | {"group_names": np.array(["all"])})
    for each, name, names in ((run, "Class", ["a", "b"]), (grouped, "Group", ["all"])):
        pictures = {p.name: p for p in figures.run_pictures(each)}
        picture = pictures["specialisation"]
        axes = picture.figure.axes[0]
        assert axes.get_xlabel() == name and name.lower() in picture.caption
        assert [text.get_text() for text in axes.get_xticklabels()] == names
        assert ("groups" in pictures) == (name == "Group")
