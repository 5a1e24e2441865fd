"""The picture of differences to the baseline."""

import pytest

from fedmoe_jax.report.difference_figure import difference_picture

from .fake_runs import load_three, make_labels


def test_the_picture_has_a_row_for_every_other_label(tmp_path):
    (picture,) = difference_picture(load_three(tmp_path), "")
    assert picture.name == "differences" and "to fedavg, seed by" in picture.caption
    panel = picture.figure.axes[0]
    assert panel.get_xlabel() == "Global, points\xa0→"
    names = [text.get_text() for text in panel.get_yticklabels()]
    assert names == ["greedy less fedavg", "random less fedavg"]
    # 10 and 20 points; -10 twice.
    means = [dots.lines[0].get_xdata()[0] for dots in panel.containers]
    assert means == pytest.approx([15, -10])


def test_there_is_no_picture_without_pairs(tmp_path):
    runs = make_labels(tmp_path, greedy={0: 0.4}, random={1: 0.5})
    assert not list(difference_picture(runs, "greedy"))
    assert not list(difference_picture(runs[:1], ""))
