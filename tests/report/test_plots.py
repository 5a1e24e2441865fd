"""Pictures of final numbers, clients and experts: bars, maps and bubbles by hand."""

import numpy as np

from fedmoe_jax.report import plots


def texts_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def shown(axes):
    return axes.images[0].get_array()


def heights(axes):
    """Left edge and height of every bar that is there, tier by tier."""
    return [
        [
            (bar.get_x() + bar.get_width() / 2, bar.get_height())
            for bar in bars
            if bar.get_height()
        ]
        for bars in axes.containers
    ]


def test_dots_by_hand():
    panels = [
        plots.Dots(
            "Global (%)",
            [np.array([40.0, 60.0]), np.array([])],
            np.array([50.0, np.nan]),
            np.array([127.1, np.nan]),
        ),
        plots.Dots(
            "Personal (%)",
            [np.array([70.0]), np.array([80.0])],
            np.array([70.0, 80.0]),
            np.array([np.nan, np.nan]),
        ),
    ]
    figure = plots.dots(["greedy", "random"], panels)
    left, right = figure.axes
    assert [axes.get_xlabel() for axes in (left, right)] == [p.title for p in panels]
    seeds = left.lines[0]
    assert seeds.get_xdata().tolist() == [40, 60]
    assert seeds.get_ydata().tolist() == [0, 0]
    assert left.get_xlim() == (-2, 102)  # the interval itself is wider
    assert right.get_xlim()[0] > -2 and right.get_xlim()[1] < 102
    assert texts_of(left.yaxis) == ["greedy", "random"]
    assert left.get_ylim() == (1.5, -0.5)  # the first on top


def test_load_map_lays_layers_side_by_side():
    load = np.array([[[3.0, 1.0], [1.0, 1.0]]])  # R = 1, G = 2, E = 2
    axes = plots.load_map(np.array([1]), load).axes[0]
    np.testing.assert_array_equal(shown(axes)[:, 0], [75, 25, 50, 50])
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5]
    axes.figure.draw_without_rendering()
    assert axes.get_ylabel() == "Layer.expert"
    assert {"0.0", "0.1", "1.0", "1.1"} <= set(texts_of(axes.yaxis))


def test_pair_maps_lay_layers_side_by_side():
    fitness = np.arange(12.0).reshape(3, 2, 2)  # [N, G, E]
    held, learnt, *_ = plots.pair_maps(np.ones((3, 2, 2)), 2, fitness).axes
    np.testing.assert_array_equal(shown(learnt), fitness.reshape(3, 4))
    np.testing.assert_array_equal(shown(held), np.full((3, 4), 50))
    for axes in (held, learnt):
        assert [line.get_xdata()[0] for line in axes.lines] == [1.5]


def test_expert_map_lays_layers_side_by_side():
    shares = np.array([[[0.9, 0.2], [0.1, 0.8]], [[0.5, 0.5], [0.5, 0.5]]])  # [G, E, L]
    axes = plots.expert_map(shares, ["a", "b"], "Class", "mass").axes[0]
    np.testing.assert_array_equal(shown(axes)[1], [10, 80])
    assert axes.get_ylabel() == "Layer.expert"


def test_pair_maps_of_one_layer_have_plain_numbers():
    figure = plots.pair_maps(np.ones((3, 1, 4)), 1, np.ones((3, 1, 4)))
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        assert axes.get_xlabel() == "Expert" and not axes.lines
        assert "2" in texts_of(axes.xaxis)


def test_pair_maps_name_the_values_of_their_colours():
    held, fitness = (
        np.array([[[4, 1]], [[0, 2]]]),
        np.array([[[0.2, 0.5]], [[0.4, 0.3]]]),
    )
    left, right = plots.pair_maps(held, 4, fitness).axes[2:]
    assert (left.get_ylabel(), right.get_ylabel()) == (
        "Rounds held (%)",
        "Fitness score",
    )
    assert left.get_ylim() == (0, 100) and right.get_ylim() == (0.2, 0.5)


def test_load_map_of_a_round_without_examples_is_zero():
    load = np.array([[[0.0, 0.0]], [[1.0, 3.0]]])  # R = 2, G = 1, E = 2
    axes = plots.load_map(np.array([1, 2]), load).axes[0]
    np.testing.assert_array_equal(shown(axes), [[0, 25], [0, 75]])


def test_pair_maps_show_assignment_in_percent_of_the_rounds():
    times_held, fitness = np.array([[[4, 1]], [[0, 2]]]), np.zeros((2, 1, 2))
    axes = plots.pair_maps(times_held, 4, fitness).axes[0]
    np.testing.assert_array_equal(shown(axes), [[100, 25], [0, 50]])
    axes = plots.pair_maps(np.zeros((2, 1, 2)), 0, fitness).axes[0]
    np.testing.assert_array_equal(shown(axes), np.zeros((2, 2)))


def test_expert_map_writes_shares_of_half_a_percent_and_more():
    shares = np.array([[[0.9, 0.004], [0.1, 0.996]]])
    axes = plots.expert_map(shares, ["a", "b"], "Class", "mass").axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "90", (0, 1): "10", (1, 1): "100"}
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours == {"90": "black", "10": "white", "100": "black"}


def test_inks_are_read_on_their_cells():
    """Cividis goes from dark blue over grey to yellow."""
    values = np.array([[0.0, 0.4], [0.7, 1.0]])
    assert plots.choose_inks(values).tolist() == [["white"] * 2, ["black"] * 2]
    one = np.array([[0.3, np.nan]])
    assert plots.choose_inks(one, 0.0)[0, 0] == "black"  # the brightest there is


def test_partition_bubbles_have_areas_by_counts():
    counts = np.array([[100, 0], [25, 50]])
    axes = plots.partition_bubbles(counts, ["a", "b"]).axes[0]
    bubbles, *keys = axes.collections
    assert bubbles.get_offsets().tolist() == [[0, 0], [0, 1], [1, 1]]
    areas = bubbles.get_sizes()
    np.testing.assert_allclose(areas / areas[0], [1, 0.25, 0.5])
    assert [key.get_label() for key in keys] == ["10", "100"]
    np.testing.assert_allclose(
        [key.get_sizes()[0] / areas[0] for key in keys], [0.1, 1]
    )


def test_partition_bubbles_of_no_examples_are_none():
    axes = plots.partition_bubbles(np.zeros((2, 2), int), ["a", "b"]).axes[0]
    assert not len(axes.collections[0].get_offsets())


def test_participation_bars_by_hand():
    tiers = np.array([0, 0, 1, 1]), ["phone", "desk"]
    (axes,) = plots.participation_bars(np.array([0, 2, 2, 5]), 5, *tiers).axes
    assert heights(axes) == [[(0, 1), (2, 1)], [(2, 1), (5, 1)]]
    # 100 rounds in bars of six: 0 to 5, ..., 96 to 101
    (axes,) = plots.participation_bars(np.array([5, 6, 96, 100]), 100, *tiers).axes
    assert heights(axes) == [[(2.5, 1), (8.5, 1)], [(98.5, 2)]]


def test_capacity_bars_by_hand():
    tiers = np.array([0, 0, 1]), ["phone", "desk"]
    (axes,) = plots.capacity_bars(np.array([1, 1, 3]), *tiers).axes
    assert heights(axes) == [[(1, 2)], [(3, 1)]]


def test_capacity_bars_show_clients_that_can_hold_nothing():
    tiers = np.array([0, 0, 1]), ["phone", "desk"]
    (axes,) = plots.capacity_bars(np.array([0, 0, 2]), *tiers).axes
    assert heights(axes) == [[(0, 2)], [(2, 1)]]
    (axes,) = plots.capacity_bars(np.zeros(3, int), *tiers).axes
    assert heights(axes) == [[(0, 2)], [(0, 1)]]


def test_accuracy_bars_by_hand():
    tiers = np.array([0, 0, 1, 1]), ["phone", "desk"]
    percent = np.array([83.0, 92.0, 94.9, np.float32(100.00001)])
    (axes,) = plots.accuracy_bars("Accuracy (%)", percent, *tiers).axes
    assert heights(axes) == [[(82.5, 1), (92.5, 1)], [(92.5, 1), (97.5, 1)]]


def test_quantile_dots_by_hand():
    groups = [np.array([30.0, 10.0, 20.0]), np.arange(100.0), np.zeros(0)]
    labels = ["few", "many", "none"]
    (axes,) = plots.quantile_dots(labels, groups, "x", coloured=True).axes
    few, few_bar, many, many_bar = axes.lines
    assert few.get_xdata().tolist() == [10, 20, 30]  # every client
    assert few_bar.get_xdata()[0] == 20 and many_bar.get_xdata()[0] == 49.5
    # A twentieth each: 0 to 4, 5 to 9, ... and their middles.
    np.testing.assert_allclose(many.get_xdata(), range(2, 100, 5))
    assert texts_of(axes.yaxis) == labels
    assert few.get_color() != many.get_color()
    (axes,) = plots.quantile_dots(labels, groups, "x", coloured=False).axes
    assert len({line.get_color() for line in axes.lines}) == 1
