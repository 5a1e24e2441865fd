"""The picture of differences: colours by what they say, a panel for each measure."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from fedmoe_jax.report.forest import Difference, Panel, draw_forest, find_colour
from fedmoe_jax.report.plots import COLOURS, GREY

GAIN, LOSS = Difference(4.0, 1.0, 1), Difference(2.0, 1.5, -1)
NONE, SINGLE = Difference(1.0, 3.0, 0), Difference(0.5, float("nan"), 0)


@pytest.mark.parametrize(
    ("difference", "better", "colour"),
    [
        (GAIN, 1, COLOURS[0]),
        (LOSS, -1, COLOURS[1]),
        (NONE, 1, GREY),
        (GAIN, 0, "black"),
        (NONE, 0, GREY),
    ],
)
def test_colours_say_what_can_be_told(difference, better, colour):
    assert find_colour(difference, better) == colour


def test_every_known_cell_has_a_dot_and_an_interval():
    panels = [Panel("Global %", 1, [GAIN, NONE]), Panel("kJ", -1, [None, LOSS])]
    figure = draw_forest(["a less b", "c less b"], panels)
    first, second = figure.axes
    assert (
        first.get_xlabel() == "Global, points\xa0→" and second.get_xlabel() == "kJ\xa0←"
    )
    dots = [container.lines[0].get_xydata()[0] for container in first.containers]
    np.testing.assert_allclose(dots, [[4.0, 0.0], [1.0, 1.0]])
    ((segment,),) = (bars.get_segments() for bars in first.containers[0].lines[2])
    np.testing.assert_allclose(segment[:, 0], [3.0, 5.0])
    (only,) = second.containers
    np.testing.assert_allclose(only.lines[0].get_xydata()[0], [2.0, 1.0])
    assert to_hex(only.lines[0].get_color()) == COLOURS[1].lower()
    names = [text.get_text() for text in first.get_yticklabels()]
    assert names == ["a less b", "c less b"]


def test_one_pair_has_no_interval():
    (axes,) = draw_forest(["a less b"], [Panel("Global %", 1, [SINGLE])]).axes
    assert not axes.containers[0].has_xerr


def test_a_long_name_of_a_measure_is_on_two_lines():
    panel = Panel("Strong less weak third %", -1, [Difference(1.0, 2.0, 0)])
    (axes,) = draw_forest(["a less b"], [panel]).axes
    assert axes.get_xlabel() == "Strong less weak third,\npoints\xa0←"
