"""The picture of a map: colours by leader, shades by margin."""

from fedmoe_jax.report.map_plot import SHADES, Verdict, draw_map, shade
from fedmoe_jax.report.plots import COLOURS, GREY

MOST = Verdict(1, 8.0, ("greedy", "8.0 ± 1.0 over fedavg"))
HALF = Verdict(-1, 4.0, ("fedavg", "4.0 ± 1.0 over greedy"))
NONE = Verdict(0, 99.0, ("greedy", "+99.0 ± 200.0 less fedavg"))


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
