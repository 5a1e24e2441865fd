"""How costs and losses are summed up and shown: numbers and pictures by hand."""

import json
import math

import numpy as np
import pytest

from fedmoe_jax.measures import LOST, MEASURES, OUTCOMES
from fedmoe_jax.options import DEVICES, Measure
from fedmoe_jax.report import cost_figures as efficiency
from fedmoe_jax.report import curves, plots, runs, summary, tables
from fedmoe_jax.report import device_figures as fleet
from fedmoe_jax.report import page as report
from fedmoe_jax.report import timeline as timeline_

CONFIG = {
    "strategy": "greedy",
    "seed": 0,
    "num_clients": 3,
    "cohort_size": 3,
    "num_experts": 2,
    "data": {"name": "digits"},
    "partition": {"kind": "iid"},
    "fitness": {"rate": 0.3},
    "weights": {"usage": 0.5},
    "devices": {"tiers": ["laptop"], "deadline": 10.0, "buffer": 0.1},
}


def make_row(number, **more):
    """One round of three clients: 6 MB, 30 s, 500 J, one client out of memory."""
    return {
        "round": number,
        "seconds": 0.1,
        "examples": 10,
        "wasted_share": 0.0,
        "expert_load": [1.0, 1.0],
        "bytes_up": 2e6,
        "bytes_down": 4e6,
        "client_flops": 1e9,
        "simulated_seconds": 30.0,
        "simulated_median_seconds": 20.0,
        "compute_joules": 400.0,
        "radio_joules": 100.0,
        "wasted_bytes": 1.5e6,
        "wasted_flops": 0.0,
        **{f"{name}_clients": 0.0 for name in OUTCOMES},
        "merged_clients": 2.0,
        "lost_memory_clients": 1.0,
        "capacity_violations": 1,
        "capacity_error": 0.5,
        "participation_jain": 0.9,
    } | more


ROWS = [
    make_row(1, dropped_clients=1.0, merged_clients=1.0, capacity_error=0.25),
    make_row(2, global_accuracy=0.3, personal_accuracy=0.5),
    make_row(3, stale_clients=2.0, merged_clients=0.0, drift_alarms=2.0),
    make_row(4, global_accuracy=0.42, personal_accuracy=0.6, participation_jain=0.8),
]
NOTHING = dict.fromkeys(
    ("bytes_up", "bytes_down", "simulated_seconds", "compute_joules", "radio_joules"),
    0.0,
) | {"wasted_bytes": 0.0, "lost_memory_clients": 0.0}
ARRAYS = {
    "capacity": np.array([1, 2, 2]),
    "belief": np.array([1, 1, 3]),
    "tier": np.array([0, 1, 1]),
    "tier_names": np.array(["phone", "desk"]),
    "participation": np.array([1, 4, 4]),
    "last_client": np.array([0, 1, 2]),
    "last_code": np.array([OUTCOMES.index("lost_memory"), 0, 1]),
    "last_phases": np.array([[2.0, 1.0, 5.0], [1.0, 1.0, 1.0], [4.0, 2.0, 9.0]]),
    "last_spent": np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    "label_counts": np.ones((3, 2), int),
    "label_names": np.array(["a", "b"]),
    "specialisation": np.full((2, 2), 0.5),
    "times_held": np.ones((3, 2), int),
    "fitness": np.full((3, 2), 0.5),
}


def make_run(tmp_path, label="greedy", rows=ROWS, arrays=ARRAYS, seed=0):
    config = CONFIG | {"strategy": label, "seed": seed}
    folder = tmp_path / f"{label}-{seed}"
    return runs.Run(config, rows, {}, arrays, folder, label, MEASURES)


def test_costs_by_hand():
    found = summary.measure_run(ROWS, MEASURES)
    assert found["total_bytes_up"] == 8e6 and found["total_bytes_down"] == 16e6
    assert found["total_simulated_seconds"] == 120
    assert found["total_joules"] == 2000
    assert found["wasted_bytes_share"] == 0.25  # 6 of 24 MB
    assert found["mean_lost_clients"] == 1.25  # 4 without memory, 1 dropped
    assert found["mean_dropped_clients"] == 0.25
    assert found["mean_stale_clients"] == 0.5
    assert found["mean_capacity_violations"] == 1
    assert found["mean_capacity_error"] == pytest.approx(1.75 / 4)
    assert found["final_participation_jain"] == 0.8
    assert found["drift_alarms"] == 2


def test_lost_and_counted_are_all_outcomes():
    counted = {"merged_clients", "stale_clients"}
    assert counted | set(LOST) == {f"{name}_clients" for name in OUTCOMES}
    assert not counted & set(LOST)
    assert set(fleet.WORDS) == set(OUTCOMES)


def test_costs_of_old_rows_are_left_out():
    old = [{"round": 1, "bytes_up": 3.0, "bytes_down": 4.0}]
    found = summary.measure_run(old, MEASURES)
    evaluated = {key for key, m in MEASURES.items() if m.over and m.evaluated}
    assert {key: found.pop(key) for key in evaluated} == dict.fromkeys(evaluated)
    assert found == {
        "total_bytes_up": 3.0,
        "total_bytes_down": 4.0,
        "megabytes_up": 3e-6,
        "megabytes_down": 4e-6,
        "megabytes": 7e-6,
    }


def test_nothing_is_wasted_where_nothing_travels():
    found = summary.measure_run([make_row(1, **NOTHING)], MEASURES)
    assert "wasted_bytes_share" not in found and found["total_wasted_bytes"] == 0


def test_costs_to_targets_by_hand():
    made = summary.make_summary(ROWS, {}, MEASURES)
    # 0.42 in round 4 is the first above 0.35 and 0.40.
    assert made["rounds_to"] == {"0.35": 4, "0.40": 4, "0.45": None, "0.50": None}
    assert made["simulated_seconds_to"] == {
        "0.35": 120.0,
        "0.40": 120.0,
        "0.45": None,
        "0.50": None,
    }
    assert made["megabytes_to"]["0.35"] == 24.0
    earlier = [*ROWS[:2], make_row(3, global_accuracy=0.36), ROWS[3]]
    found = summary.costs_to_targets(earlier, Measure("bytes_up", unit=1e6))
    assert (found["0.35"], found["0.40"]) == (6.0, 8.0)


def test_numbers_of_a_finished_run(tmp_path):
    made = summary.make_summary(ROWS, {}, MEASURES)
    made = json.loads(json.dumps(made))
    found = runs.numbers(make_run(tmp_path)._replace(summary=made), MEASURES)
    assert found["megabytes_to.0.40"] == 24 and found["megabytes_to.0.50"] == math.inf
    assert found["simulated_seconds_to.0.45"] == math.inf
    assert found["simulated_minutes"] == 2 and found["kilojoules"] == 2
    assert found["megabytes_up"] == 2 and found["gigaflops"] == 1


def test_numbers_of_devices_are_unknown_without_any(tmp_path):
    rows = [make_row(n, **NOTHING) for n in (1, 2)]
    found = runs.numbers(make_run(tmp_path, rows=rows), MEASURES)
    of_devices = [key for key, measure in MEASURES.items() if measure.of == DEVICES]
    assert len(of_devices) == 6 and all(math.isnan(found[key]) for key in of_devices)
    assert found["megabytes_up"] == 0


def cells_of(table, label):
    columns, rows = table
    return dict(zip(titles_of(columns), rows[label], strict=True))


def titles_of(columns):
    return [column.title for column in columns]


def test_no_traffic_and_no_devices_are_never_best(tmp_path):
    silent = [make_row(n, **NOTHING) for n in (1, 2)]
    cheap = [make_row(n, bytes_up=1e6, radio_joules=50.0) for n in (1, 2)]
    made = [make_run(tmp_path, "local", silent), make_run(tmp_path, "greedy")]
    two = tables.table(made)
    three = tables.table([*made, make_run(tmp_path, "random", cheap)])
    assert cells_of(three, "local")["MB up a round"].text == "0.0"
    assert cells_of(three, "local")["kJ"].text == "–"
    for title in ("MB up a round", "kJ"):
        best = [label for label in three[1] if cells_of(three, label)[title].best]
        assert best == ["random"]
        # With one rival only there is no comparison.
        assert not any(cells_of(two, label)[title].best for label in two[1])


def test_columns_are_left_out_where_they_say_nothing(tmp_path):
    losses = {"Lost a round", "Stale a round", "Capacity error", "Wasted MB %"}
    losses |= {"Capacity violations a round", "Jain of participation"}
    columns, _ = tables.table([make_run(tmp_path)])
    assert losses | {"Simulated min", "kJ"} <= set(titles_of(columns))
    calm = dict(lost_memory_clients=0.0, capacity_violations=0, wasted_bytes=0.0)
    calm |= {"participation_jain": 1.0}
    rows = [make_row(n, **calm) for n in (1, 2)]  # the error 0.5 is always the same
    columns, _ = tables.table([make_run(tmp_path, rows=rows)])
    titles = set(titles_of(columns))
    assert not losses & titles and "kJ" in titles


def test_jain_has_a_column_where_labels_differ(tmp_path):
    uneven = [make_row(1, participation_jain=0.7)]
    same = [make_run(tmp_path, label) for label in ("greedy", "random")]
    assert "Jain of participation" not in titles_of(tables.table(same)[0])
    both = [same[0], make_run(tmp_path, "random", uneven)]
    assert cells_of(tables.table(both), "greedy")["Jain of participation"].best


def test_common_mean_by_hand():
    seeds = [
        (np.array([1.0, 3.0]), np.array([0.0, 20.0])),
        (np.array([2.0, 4.0]), np.array([30.0, 50.0])),
    ]
    costs, mean = curves.common_mean(seeds)
    # At 2 the lines are at 10 and 30, at 3 they are at 20 and 40.
    assert costs.tolist() == [2, 3] and mean.tolist() == [20, 30]
    apart = [seeds[0], (np.array([5.0, 6.0]), np.array([1.0, 2.0]))]
    assert [len(part) for part in curves.common_mean(apart)] == [0, 0]
    tracks = [curves.Tracks(0, "a", apart)]
    assert curves.cost_curves(tracks, "x", "y", None).axes  # named at the later seed


def test_tracks_by_hand(tmp_path):
    time, traffic = efficiency.COSTS
    accuracy = MEASURES["final_global_accuracy"]
    run = make_run(tmp_path)
    minutes, percent = efficiency.track(run, accuracy, time)
    assert minutes.tolist() == [1, 2] and percent.tolist() == [30, 42]
    megabytes, _ = efficiency.track(run, accuracy, traffic)
    assert megabytes.tolist() == [12, 24]
    worst = MEASURES["final_worst_decile_accuracy"]
    assert efficiency.track(run, worst, time) is None
    silent = [make_row(1, global_accuracy=0.5, **NOTHING)]
    free = make_run(tmp_path, rows=silent)
    assert efficiency.track(free, accuracy, traffic) is None


def test_a_strategy_without_costs_is_left_out_and_named(tmp_path):
    silent = [make_row(2, global_accuracy=0.5, personal_accuracy=0.5, **NOTHING)]
    made = [make_run(tmp_path), make_run(tmp_path, "local", silent)]
    found = list(efficiency.cost_pictures(runs.group_runs(made)))
    assert [picture.name for picture in found] == [
        f"{which}_accuracy_{cost}"
        for which in ("global", "personal")
        for cost in ("time", "traffic")
    ]
    assert "Left out: local, which exchanges nothing." in found[1].caption


def test_rows_of_a_timeline():
    seconds = np.array([3.0, 9.0, 5.0])
    assert timeline_.choose_rows(seconds).tolist() == [1, 2, 0]
    many = np.arange(100.0)
    chosen = timeline_.choose_rows(many)
    assert len(set(chosen.tolist())) == timeline_.MOST_ROWS
    assert chosen[:20].tolist() == list(range(99, 79, -1))
    # The sample is even, from the slowest of the others to the fastest.
    assert chosen[20] == 79 and chosen[-1] == 0
    assert set(np.diff(chosen[20:])) <= {-4, -5}


@pytest.mark.parametrize(
    ("phases", "deadline", "last"),
    [
        ([[1, 1, 2], [2, 2, 2]], 10.0, 10.0),  # up to the deadline
        ([[1, 1, 2], [2, 2, 2]], 1e9, 6.0),  # there is hardly one
        ([[1, 1, 2], [0, 0, np.inf]], 1e9, 4.0),  # an endless plan
    ],
)
def test_end_of_a_timeline(phases, deadline, last):
    spent = np.array([[1, 1, 1], [0, 0, 0]])
    found = timeline_.last_second(np.array(phases, float), spent, deadline)
    assert found == pytest.approx(1.03 * last)


def test_bars_of_a_timeline_by_hand():
    phases = np.array([[2.0, 1.0, 5.0], [np.inf, 1.0, 1.0]])
    spent = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    words = ("dropped out", "")
    figure = timeline_.timeline(np.array([7, 3]), phases, spent, words, 9.0, 10.0)
    (axes,) = figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    # By phase: two plans, then what took place of them. An endless plan is cut.
    assert bars[:4] == [(0, 2), (0, 20), (0, 2), (0, 0)]
    assert bars[4] == (2, 1) and bars[6] == (2, 0.5)
    assert bars[8] == (3, 5) and bars[10] == (3, 0)
    assert [text.get_text() for text in axes.texts] == list(words)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["download", "training", "upload", "did not happen", "deadline"]


def test_outcome_bands_stack():
    bands = [
        timeline_.Band("merged", "k", np.array([2.0, 1.0])),
        timeline_.Band("lost", "r", np.array([1.0, 2.0])),
    ]
    (axes,) = timeline_.outcome_bands(np.array([1, 2]), bands).axes
    first, second = (patch.get_data() for patch in axes.patches)
    assert first.values.tolist() == [2, 1] and second.values.tolist() == [3, 3]
    assert second.baseline.tolist() == [2, 1]
    assert second.edges.tolist() == [0.5, 1.5, 2.5]


def test_belief_bubbles_count_clients():
    capacity, belief = np.array([1, 1, 2, 2]), np.array([1, 1, 3, 1])
    (axes,) = timeline_.belief_bubbles(capacity, belief).axes
    places = {text.get_position(): text.get_text() for text in axes.texts}
    assert places == {(1, 1): "2", (2, 3): "1", (2, 1): "1"}


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


def test_bars_of_participation_by_hand():
    tiers = np.array([0, 0, 1, 1]), ["phone", "desk"]
    (axes,) = plots.participation_bars(np.array([0, 2, 2, 5]), 5, *tiers).axes
    assert heights(axes) == [[(0, 1), (2, 1)], [(2, 1), (5, 1)]]
    # 100 rounds in bars of six: 0 to 5, ..., 96 to 101
    (axes,) = plots.participation_bars(np.array([5, 6, 96, 100]), 100, *tiers).axes
    assert heights(axes) == [[(2.5, 1), (8.5, 1)], [(98.5, 2)]]


def test_bars_of_capacity_by_hand():
    tiers = np.array([0, 0, 1]), ["phone", "desk"]
    (axes,) = plots.capacity_bars(np.array([1, 1, 3]), *tiers).axes
    assert heights(axes) == [[(1, 2)], [(3, 1)]]


def test_clients_that_can_hold_nothing_are_shown():
    tiers = np.array([0, 0, 1]), ["phone", "desk"]
    (axes,) = plots.capacity_bars(np.array([0, 0, 2]), *tiers).axes
    assert heights(axes) == [[(0, 2)], [(2, 1)]]
    (axes,) = plots.capacity_bars(np.zeros(3, int), *tiers).axes
    assert heights(axes) == [[(0, 2)], [(0, 1)]]


def names_of(run):
    return [picture.name for picture in fleet.device_pictures(run)]


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


def test_captions_of_a_large_cohort(tmp_path):
    large = dict(
        last_client=np.arange(60),
        last_code=np.zeros(60, int),
        last_phases=np.tile([1.0, 2.0, 3.0], (60, 1)),
        last_spent=np.ones((60, 3)),
    )
    run = make_run(tmp_path, arrays=ARRAYS | large)
    (found,) = (p for p in fleet.device_pictures(run) if p.name == "timeline")
    assert "Of 60 clients these are the 20 slowest and an even sample of 20" in (
        found.caption
    )


def test_page_with_costs(tmp_path):
    made = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    names = ("capacity", "belief", "tier", "participation")
    one = {name: ARRAYS[name][:1] for name in names}
    made.insert(0, make_run(tmp_path, "centralised", ROWS[:2], ARRAYS | one))
    path = report.write_report(tmp_path / "out", made, "c")
    text = path.read_text(encoding="utf-8")
    assert "<h2>Against time and traffic</h2>" in text
    assert "<b>Lost a round</b>: clients whose update did not count" in text
    assert text.count("<th>Strategy</th>") == 3  # learning, costs, signatures
    figures = {each.stem for each in (path.parent / "figures").glob("*.png")}
    assert {"global_accuracy_time", "personal_accuracy_traffic"} <= figures
    # The clients are shown of a run that has them, not of the pooled one.
    assert {"capacity_error", "capacity", "greedy-timeline", "greedy-belief"} <= figures
