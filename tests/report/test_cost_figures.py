"""Accuracy against time and traffic: curves by hand, and who is left out."""

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.report.cost_figures import COSTS, cost_pictures, track
from fedmoe_jax.report.runs import group_runs

from .fake_runs import NOTHING, ROWS, make_row, make_run, make_text_run


def test_track_by_hand(tmp_path):
    time, traffic = COSTS
    accuracy = MEASURES["final_global_accuracy"]
    run = make_run(tmp_path)
    minutes, percent = track(run, accuracy, time)
    assert minutes.tolist() == [1, 2] and percent.tolist() == [30, 42]
    megabytes, _ = track(run, accuracy, traffic)
    assert megabytes.tolist() == [12, 24]
    worst = MEASURES["final_worst_decile_accuracy"]
    assert track(run, worst, time) is None
    silent = [make_row(1, global_accuracy=0.5, **NOTHING)]
    free = make_run(tmp_path, rows=silent)
    assert track(free, accuracy, traffic) is None


def test_track_has_nothing_before_the_first_evaluation(tmp_path):
    accuracy = MEASURES["final_global_accuracy"]
    for rows in ([], ROWS[:1]):
        run = make_run(tmp_path, rows=rows)
        assert [track(run, accuracy, cost) for cost in COSTS] == [None, None]


def test_cost_pictures_leave_out_and_name_a_strategy_without_costs(tmp_path):
    silent = [make_row(2, global_accuracy=0.5, personal_accuracy=0.5, **NOTHING)]
    made = [make_run(tmp_path), make_run(tmp_path, "local", silent)]
    found = list(cost_pictures(group_runs(made)))
    assert [picture.name for picture in found] == [
        f"{which}_accuracy_{cost}"
        for which in ("global", "personal")
        for cost in ("time", "traffic")
    ]
    assert "Left out: local, which exchanges nothing." in found[1].caption


def test_cost_pictures_of_bits_have_their_limit(tmp_path):
    made = [make_text_run(tmp_path, label) for label in ("greedy", "random")]
    written = {
        picture.name: [text.get_text() for text in picture.figure.axes[0].texts]
        for picture in cost_pictures(group_runs(made))
    }
    assert "limit" in written["global_bits_time"]
    assert "limit" in written["personal_bits_traffic"]
    assert "limit" not in written["global_accuracy_time"]


def test_cost_pictures_of_one_strategy_share_its_accuracies(tmp_path):
    seeds = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    found = list(cost_pictures(group_runs(seeds)))
    assert [picture.name for picture in found] == ["accuracy_time", "accuracy_traffic"]
    for picture in found:
        (axes,) = picture.figure.axes
        written = {text.get_text() for text in axes.texts}
        assert written == {"Global", "Personal", "chance"}
    early = make_run(tmp_path, rows=ROWS[:1])
    assert list(cost_pictures(group_runs([early]))) == []
