"""Margins: lengths of texts, and that no picture of a report cuts any off."""

import numpy as np
import pytest

from fedmoe_jax.report import margins
from fedmoe_jax.report.client_figures import client_pictures
from fedmoe_jax.report.cost_figures import cost_pictures
from fedmoe_jax.report.device_figures import compared_device_pictures, device_pictures
from fedmoe_jax.report.figures import (
    curve_pictures,
    final_picture,
    population_pictures,
    run_pictures,
)
from fedmoe_jax.report.runs import group_runs

from .fake_runs import ARRAYS, ROWS, make_row, make_run

LONG = "a strategy with a name of many letters, which says all that it does"
LARGE = [row | {"simulated_seconds": 3e5, "bytes_up": 8e13} for row in ROWS]
NAMED = ARRAYS | {
    "label_names": np.array(["automobile", "aeroplane of the old kind"]),
    "tier_names": np.array(["phone", "a workstation under the desk"]),
    "client_accuracy": np.array([0.5, 0.7, 1.0]),
}


def test_text_width_grows_with_letters_and_their_size():
    width = margins.text_width("iii")
    assert 0 < width < margins.text_width("MMM") < 0.5
    assert width < margins.text_width("iii", weight="bold")
    assert margins.text_width("iii", 14.0) == pytest.approx(2 * width, rel=0.05)
    assert margins.widest([]) == 0
    assert margins.widest(["i", "MM"]) == margins.text_width("MM")


def test_settle_gives_panels_the_size_that_is_asked_for():
    figure, panels = margins.open_panels(2, (1.5, 1.0))
    for panel in panels:
        panel.set(xlabel="x", ylabel="y", ylim=(0, 1000))
    margins.settle(panels, (1.5, 1.0), [0.0, 0.4])
    paper = figure.get_size_inches()
    for panel in panels:
        place = panel.get_position()
        np.testing.assert_allclose(np.array(place.size) * paper, (1.5, 1.0))
    first, second = (panel.get_position() for panel in panels)
    assert first.x1 < second.x0 and second.x1 < 1 - 0.4 / paper[0]


def pictures_of(*runs):
    groups = group_runs(runs)
    yield from final_picture(groups)
    yield from curve_pictures(groups)
    yield from cost_pictures(groups)
    yield from client_pictures(groups)
    yield from compared_device_pictures(groups)
    for run in runs:
        yield from population_pictures(run)
        yield from run_pictures(run)
        yield from device_pictures(run, alone=True)


def beyond_paper(figure):
    """Inches by which anything drawn goes beyond an edge of the paper, at most."""
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return max(-drawn.x0, -drawn.y0, drawn.x1 - width, drawn.y1 - height)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["greedy", LONG])
@pytest.mark.parametrize("rows", [ROWS, LARGE], ids=["small", "large"])
def test_no_text_of_a_report_is_cut_off(tmp_path, label, rows):
    evaluated = [row | {"expert_accuracy": [0.25, 0.5]} for row in rows]
    runs = [
        make_run(tmp_path, label, evaluated, NAMED),
        make_run(tmp_path, "random", [make_row(n) for n in (1, 2)]),
    ]
    for picture in pictures_of(*runs):
        assert beyond_paper(picture.figure) < 0.01, picture.name
