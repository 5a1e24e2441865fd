"""The picture of a map: colours by leader, shades by margin."""

from fedmoe_jax.report.map_plot import SHADES, Verdict, draw_map, shade
from fedmoe_jax.report.plots import COLOURS, GREY

MOST = Verdict(1, 8.0, ("greedy", "8.0 ± 1.0 over fedavg"))
HALF = Verdict(-1, 4.0, ("fedavg", "4.0 ± 1.0 over greedy"))
NONE = Verdict(0, 99.0, ("greedy", "+99.0 ± 200.0 against fedavg"))


def test_shades_say_who_leads_and_by_how_much_of_the_most():
    column = [MOST, HALF, NONE, None]
    looks = [shade(verdict, column) for verdict in column[:3]]
    colours = [look["facecolor"] for look in looks]
    assert colours == [COLOURS[0], COLOURS[1], GREY]
    assert looks[0]["alpha"] == SHADES[1]
    assert looks[1]["alpha"] == sum(SHADES) / 2


def test_cells_without_a_number_stay_empty():
    figure = draw_map(["a", "b"], ["x", "y"], [[MOST, None], [NONE, HALF]])
    (axes,) = figure.axes
    assert len(axes.patches) == 3 and len(axes.texts) == 6
    assert axes.texts[0].get_text() == "greedy"


def test_columns_are_as_wide_as_their_lines_and_the_paper_ends_with_them():
    long = Verdict(1, 1.0, ("a", "0.125 ± 0.024 bits over a_control_of_its_own"))
    figure = draw_map(["a", "b"], ["x", "y"], [[long, HALF], [NONE, HALF]])
    (axes,), paper = figure.axes, figure.get_tightbbox()
    assert all("..." not in text.get_text() for text in axes.texts)
    cell, text = axes.patches[0], axes.texts[1]
    assert text.get_text() == long.lines[1]
    assert text.get_window_extent().width < cell.get_window_extent().width
    winner = Verdict(1, 1.0, ("prototypes max_held=1 num_active=1", "0.1 over a"))
    (axes,) = draw_map(["a"], ["x"], [[winner]]).axes
    cell, bold = axes.patches[0], axes.texts[0]
    assert bold.get_window_extent().width < cell.get_window_extent().width
    width, height = figure.get_size_inches()
    edges = paper.x0, paper.y0, width - paper.x1, height - paper.y1
    assert all(-0.01 < edge < 0.12 for edge in edges), edges
