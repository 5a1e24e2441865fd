"""The pictures of one run's devices: which there are, and what they say."""

import numpy as np

from fedmoe_jax.measures import OUTCOMES
from fedmoe_jax.report.device_figures import (
    WORDS,
    compared_device_pictures,
    device_pictures,
)
from fedmoe_jax.report.runs import group_runs

from .fake_runs import ARRAYS, NOTHING, make_row, make_run


def names_of(run):
    return [picture.name for picture in device_pictures(run, alone=True)]


def find_picture(run, name):
    (found,) = (
        picture for picture in device_pictures(run, alone=True) if picture.name == name
    )
    return found


def test_words_name_every_outcome_in_a_way_of_its_own():
    assert set(WORDS) == set(OUTCOMES)
    for texts in zip(*WORDS.values(), strict=True):
        assert len(set(texts)) == len(OUTCOMES)


def test_device_pictures_only_where_there_is_something_to_see(tmp_path):
    run = make_run(tmp_path)
    seen = ["round_time", "timeline", "outcomes", "participation", "belief"]
    assert names_of(run) == seen
    even = ARRAYS | {"participation": np.array([3, 3, 3])}
    assert names_of(run._replace(arrays=even)) == [*seen[:3], "belief"]
    calm = dict(lost_memory_clients=0.0, merged_clients=3.0, capacity_error=0.0)
    rows = [make_row(n, **calm) for n in (1, 2)]
    quiet = run._replace(rows=rows, arrays=even)
    assert names_of(quiet) == ["round_time", "timeline"]
    still = even | {"last_phases": np.zeros((3, 3))}
    rows = [make_row(1, **calm | NOTHING | {"simulated_median_seconds": 0.0})]
    assert names_of(run._replace(rows=rows, arrays=still)) == []


def test_device_pictures_of_a_run_in_progress_are_of_its_rows(tmp_path):
    assert names_of(make_run(tmp_path, arrays={})) == ["round_time", "outcomes"]
    assert names_of(make_run(tmp_path, rows=[], arrays={})) == []


def test_device_pictures_say_what_is_shown_of_a_large_cohort(tmp_path):
    large = dict(
        last_client=np.arange(60),
        last_code=np.zeros(60, int),
        last_phases=np.tile([1.0, 2.0, 3.0], (60, 1)),
        last_spent=np.ones((60, 3)),
    )
    found = find_picture(make_run(tmp_path, arrays=ARRAYS | large), "timeline")
    assert "Of 60 clients these are the 20 slowest and an even sample of 20" in (
        found.caption
    )


def test_device_pictures_say_that_an_endless_plan_goes_on(tmp_path):
    beyond = "Plans that meet the right edge go on beyond it."
    assert beyond not in find_picture(make_run(tmp_path), "timeline").caption
    phases = ARRAYS["last_phases"].copy()
    phases[0, 2] = np.inf
    endless = make_run(tmp_path, arrays=ARRAYS | {"last_phases": phases})
    found = find_picture(endless, "timeline")
    assert beyond in found.caption
    (axes,) = found.figure.axes
    # The slowest is on top; its ending is in words, that of a merged client is not.
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "2", "1"]
    words = [text.get_text() for text in axes.texts]
    assert words == ["out of memory", "late, merged a round later", ""]


def test_device_pictures_stack_only_outcomes_that_occur(tmp_path):
    (axes,) = find_picture(make_run(tmp_path), "outcomes").figure.axes
    stacked = {patch.get_label(): patch.get_data() for patch in axes.patches}
    names = ["merged", "late, merged a round later", "late, dropped", "out of memory"]
    assert list(stacked) == names
    assert stacked["late, dropped"].values.tolist() == [2, 2, 2, 2]
    assert stacked["out of memory"].values.tolist() == [3, 3, 3, 3]


def test_device_pictures_of_one_among_others_are_without_its_times(tmp_path):
    found = device_pictures(make_run(tmp_path), alone=False)
    names = [picture.name for picture in found]
    assert names == ["outcomes", "participation", "belief"]


def test_compared_device_pictures_have_the_slowest_client_of_each(tmp_path):
    slow = ARRAYS | {"last_phases": ARRAYS["last_phases"] * 2}
    made = [make_run(tmp_path), make_run(tmp_path, "random", arrays=slow)]
    times, last = compared_device_pictures(group_runs(made))
    assert (times.name, last.name) == ("round_time", "timeline")
    (axes,) = times.figure.axes
    assert [t.get_text() for t in axes.texts] == ["deadline", "greedy", "random"]
    (axes,) = last.figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["greedy", "random"]
    training = axes.collections[2].get_segments()  # the plans of the second phase
    # Of client 2: 4 s of download, 2 s of training; twice that.
    assert [bar[:, 0].tolist() for bar in training] == [[4, 6], [8, 12]]


def test_compared_device_pictures_show_no_deadline_where_there_are_several(tmp_path):
    one, other = make_run(tmp_path), make_run(tmp_path, "random")
    other.config["devices"] = other.config["devices"] | {"deadline": 9.0}
    times, _ = compared_device_pictures(group_runs([one, other]))
    (axes,) = times.figure.axes
    assert [text.get_text() for text in axes.texts] == ["greedy", "random"]


def test_compared_device_pictures_need_devices_that_take_time(tmp_path):
    rows = [make_row(1, **NOTHING)]
    made = [make_run(tmp_path, label, rows, {}) for label in ("greedy", "random")]
    assert list(compared_device_pictures(group_runs(made))) == []
