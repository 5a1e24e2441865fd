"""Reports: numbers by hand, self-contained pages, signatures on hand-made rows."""

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import FINAL, UserError
from fedmoe_jax.report import curves, plots, signatures, tables
from fedmoe_jax.report import page as report
from fedmoe_jax.report import runs as runs_

pytestmark = pytest.mark.slow

ACCURACIES = [m.field for m in MEASURES.values() if m.over == FINAL]
NAMES = [f"class{i}" for i in range(5)]
N, L = 6, len(NAMES)
CONFIG = {
    "strategy": "load_balanced",
    "num_rounds": 8,
    "num_clients": N,
    "cohort_size": N,
    "num_experts": 4,
    "data": {"name": "digits", "dir": ""},
    "partition": {"kind": "dirichlet", "alpha": 0.1},
    "fitness": {"rate": 0.3, "idle": "decay", "exploration": 0.0},
    "weights": {"fitness": 0.5, "usage": 0.5},
    "devices": {"tiers": ["phone", "laptop"], "deadline": 60.0, "buffer": 0.1},
    "run": {"tensorboard": True},
}


def fake_rows(rng, top, num_experts):
    rows = []
    for at in range(1, 9):
        load = rng.integers(100, 900, num_experts)
        row = {
            "round": at,
            "seconds": 0.5,
            "expert_load": load.tolist(),
            "load_cv": float(load.std() / load.mean()),
            "load_entropy": 0.9 if num_experts > 1 else None,
            "starved_experts": 0,
            "bytes_up": 2_000_000,
            "bytes_down": 3_000_000,
            "fitness_change": 0.01,
            "assignment_change": 0.1,
            "simulated_seconds": 50.0,
            "simulated_median_seconds": 30.0,
            "late_clients": 0,
        }
        if at % 2 == 0:
            for name in ACCURACIES:
                row[name] = top * at / 8
            row["expert_accuracy"] = rng.uniform(0.1, 0.4, num_experts).tolist()
        rows.append(row)
    return rows


def fake_summary(strategy, seed, rows):
    final = {f"final_{name}": rows[-1][name] for name in ACCURACIES}
    reached = [r["round"] for r in rows if (r.get("global_accuracy") or 0) >= 0.35]
    return final | {
        "strategy": strategy,
        "seed": seed,
        "num_rounds": 8,
        "note": f"{strategy} <needs> | nothing",
        "rounds_to": {"0.35": reached[0] if reached else None, "0.50": None},
        "rounds_to_95_percent_of_final": 8,
        "mean_load_cv": 0.3,
        "mean_load_entropy": 0.9,
        "starved_experts": 0.0,
        "total_bytes_up": 16e6,
        "total_bytes_down": 24e6,
        "total_client_flops": 32e9,
        "peak_client_parameters": 5e4,
        "needs": "luck" if strategy == "greedy" else "",
        "nonfinite_clients": 0,
        "wall_seconds": 4.5,
    }


def fake_run(folder, strategy="greedy", seed=0, top=0.5, num_experts=4, **weights):
    """Writes the files of a finished run and returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = CONFIG | {"strategy": strategy, "seed": seed}
    config["weights"] = CONFIG["weights"] | weights
    (folder / "config.json").write_text(json.dumps(config))
    rows = fake_rows(rng, top, num_experts)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "summary.json").write_text(json.dumps(fake_summary(strategy, seed, rows)))
    np.savez(
        folder / "final.npz",
        fitness=rng.random((N, num_experts), np.float32),
        times_held=rng.integers(0, 9, (N, num_experts)),
        capacity=rng.integers(1, 5, N),
        tier=rng.integers(0, 2, N),
        label_counts=rng.integers(0, 90, (N, L)),
        specialisation=rng.dirichlet(np.ones(num_experts), L).T,
        label_names=np.array(NAMES),
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two strategies and a dense control, two seeds each; one seed diverged."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for strategy, num_experts in (("fedavg", 1), ("greedy", 4), ("random", 4)):
        for seed, top in ((0, 0.4), (1, 0.6)):
            folder = root / f"{strategy}-{seed}"
            made.append(fake_run(folder, strategy, seed, top, num_experts))
    diverged = json.loads((made[-1] / "summary.json").read_text())
    diverged["final_global_accuracy"] = None
    (made[-1] / "summary.json").write_text(json.dumps(diverged))
    return [runs_.load_run(folder) for folder in made]


class Resources(HTMLParser):
    """Collects what a page would load, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path):
    text = path.read_text(encoding="utf-8")
    page = Resources()
    page.feed(text)
    assert not page.open
    assert page.found and all(
        v.startswith("data:image/png;base64,") for v in page.found
    )
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    figures = list((path.parent / "figures").glob("*.png"))
    assert len(figures) == len(page.found)
    for figure in figures:
        assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return text, {figure.stem for figure in figures}


def test_comparison_page(runs, tmp_path):
    text, figures = check_page(report.write_report(tmp_path, runs, "python x <y>"))
    assert "python x &lt;y&gt;" in text and "greedy &lt;needs&gt;" in text
    assert {"final_accuracy", "global_accuracy", "load_cv", "partition"} <= figures
    assert "greedy-specialisation" in figures
    assert "fedavg-load" not in figures  # one expert has no balance to show


def test_single_page(runs, tmp_path):
    text, figures = check_page(report.write_report(tmp_path, runs[2:3], "c"))
    assert "fitness.rate = 0.3" in text
    alignment = {"load", "expert_accuracy", "assignment", "fitness", "specialisation"}
    assert figures == alignment | {
        "accuracy",
        "accuracy_time",
        "accuracy_traffic",
        "load_cv",
        "partition",
        "capacity",
        "round_time",
    }


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_run_in_progress(tmp_path, num_rows):
    folder = fake_run(tmp_path / "run")
    for name in ("summary.json", "final.npz"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    half_a_row = lines[num_rows][:20]
    (folder / "metrics.jsonl").write_text("".join(lines[:num_rows]) + half_a_row)
    run = runs_.load_run(folder)
    assert [row["round"] for row in run.rows] == list(range(1, num_rows + 1))
    path = report.write_report(tmp_path / "out", [run], "c")
    assert "too early to tell" in path.read_text(encoding="utf-8")


def test_rows_without_optional_fields(tmp_path, runs):
    bare = [{"round": 1, "seconds": 0.1}, {"round": 2, "global_accuracy": None}]
    run = runs[2]._replace(rows=bare, summary={}, arrays={})
    assert math.isnan(runs_.numbers(run, MEASURES)["final_global_accuracy"])
    assert report.write_report(tmp_path, [run, runs[3]], "c").exists()


def add_layers(folder, num_layers):
    """Gives the files of a run with one MoE layer several; the load of the last halves.

    Expert e of layer g has (g + 1) times the fitness of expert e of layer 0.
    """
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        for name in {"expert_load", "expert_accuracy"} & row.keys():
            row[name] = [row[name]] * num_layers
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with np.load(folder / "final.npz") as stored:
        arrays = dict(stored)
    layers = np.arange(1, num_layers + 1)
    arrays["fitness"] = arrays["fitness"][:, None] * layers[:, None]  # [N, G, E]
    arrays["times_held"] = np.stack([arrays["times_held"]] * num_layers, axis=1)
    arrays["specialisation"] = np.stack([arrays["specialisation"]] * num_layers)
    np.savez(folder / "final.npz", **arrays)
    return folder


def test_pages_of_several_layers(tmp_path):
    run = runs_.load_run(add_layers(fake_run(tmp_path / "run"), 3))
    one = runs_.load_run(fake_run(tmp_path / "one", "random"))
    assert runs_.num_experts(run) == runs_.num_experts(one) == 4
    text, figures = check_page(report.write_report(tmp_path / "out", [run, one], "c"))
    alignment = {"load", "expert_accuracy", "assignment", "fitness", "specialisation"}
    assert {f"greedy-{name}" for name in alignment} <= figures
    assert "columns sum to 100 % in every layer." in text


def texts_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_maps_lay_layers_side_by_side():
    load = np.array([[[3.0, 1.0], [1.0, 1.0]]])  # R = 1, G = 2, E = 2
    axes = plots.load_map(np.array([1]), load).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array()[:, 0], [75, 25, 50, 50])
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5]
    axes.figure.draw_without_rendering()
    assert axes.get_ylabel() == "Layer.expert"
    assert {"0.0", "0.1", "1.0", "1.1"} <= set(texts_of(axes.yaxis))
    fitness = np.arange(12.0).reshape(3, 2, 2)  # [N, G, E]
    axes = plots.fitness_map(fitness).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), fitness.reshape(3, 4))
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5]
    shares = np.array([[[0.9, 0.2], [0.1, 0.8]], [[0.5, 0.5], [0.5, 0.5]]])  # [G, E, L]
    axes = plots.specialisation_map(shares, ["a", "b"]).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array()[1], [10, 80])
    assert axes.get_ylabel() == "Layer.expert"


def test_a_map_of_one_layer_has_plain_numbers():
    axes = plots.fitness_map(np.ones((3, 1, 4))).axes[0]
    axes.figure.draw_without_rendering()
    assert axes.get_xlabel() == "Expert" and not axes.lines
    assert "2" in texts_of(axes.xaxis)


LIMIT = """
import sys
from pathlib import Path
from fedmoe_jax.report.page import write_report
from fedmoe_jax.report.runs import load_run
from fedmoe_jax.report.tables import markdown_table, write_runs_csv

runs = [load_run(Path(folder)) for folder in sys.argv[2:]]
write_report(Path(sys.argv[1]), runs, "c")
write_runs_csv(Path(sys.argv[1]) / "runs.csv", runs)
print(markdown_table(runs)[:12])
print(*sys.modules)
"""


def test_drawing_a_page_imports_no_jax_and_no_model(tmp_path):
    folders = [str(fake_run(tmp_path / name, name)) for name in ("greedy", "random")]
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, str(tmp_path / "out"), *folders],
        cwd=Path(report.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    head, imported = done.stdout.splitlines()
    assert head == "| Strategy |" and (tmp_path / "out" / "report.html").exists()
    imported = imported.split()
    heavy = {
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax",
        "ml_collections",
        "tensorboardX",
    }
    assert not heavy & set(imported)
    own = {name for name in imported if name.partition(".")[0] == "fedmoe_jax"}
    rooms = {name for name in own if not name.startswith("fedmoe_jax.report")}
    allowed = {"measures", "options", "runtime", "runtime.files"}
    assert rooms == {"fedmoe_jax", *(f"fedmoe_jax.{name}" for name in allowed)}


def test_errors(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        runs_.load_run(tmp_path)
    with pytest.raises(UserError, match="no runs"):
        report.write_report(tmp_path / "out", [], "c")


def test_interval_by_hand():
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.30265: 4.30265 / sqrt(3).
    mean, half = runs_.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(2.48414, abs=1e-5)
    assert math.isnan(runs_.interval([1.0])[1])


def test_cells_by_hand():
    assert tables.mean_cell([0.1, 0.2, 0.3], 100, 1).text == "20.0 ± 24.8"
    assert tables.mean_cell([0.1, math.nan], 100, 1).text == "10.0 (1/2)"
    assert tables.mean_cell([2.0, 2.0], 1, 1).text == "2.0"
    assert tables.mean_cell([math.nan], 1, 1).text == "–"
    assert tables.median_cell([10, math.inf, 20]).text == "20 (2/3)"
    assert tables.median_cell([10, math.inf, math.inf]).text == "– (1/3)"


def test_table_marks_best(runs):
    columns, rows = tables.table(runs)
    titles = [column.title for column in columns]
    cells = {label: dict(zip(titles, row, strict=True)) for label, row in rows.items()}
    # 0.4 and 0.6: half-width is 12.7062 * 0.141421 / sqrt(2) = 1.27.
    assert cells["greedy"]["Global %"].text == "50.0 ± 127.1"
    assert cells["random"]["Global %"].text == "40.0 (1/2)"
    best = [label for label in cells if cells[label]["Global %"].best]
    assert best == ["fedavg", "greedy"]
    assert not any(row["MB up a round"].best for row in cells.values())  # all equal
    assert cells["fedavg"]["Load CV"].text == "–"
    assert cells["greedy"]["MB up a round"].text == "2.0"
    # 0.4 * 8 / 8 reaches 0.35 in round 8; 0.6 * 6 / 8 in round 6.
    assert cells["greedy"]["Rounds to 35 %"].text == "7 (2/2)"


def test_markdown_table(runs):
    lines = tables.markdown_table(runs).splitlines()
    assert len(lines) == 2 + 3
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(columns) == {columns[0]}
    assert "**50.0 ± 127.1**" in lines[3] and "`greedy`" in lines[3]


def test_varied_fields_split_labels(tmp_path):
    folders = [
        fake_run(tmp_path / f"{usage}-{seed}", "greedy", seed, usage=usage)
        for usage in (0.3, 0.7)
        for seed in (0, 1)
    ]
    runs = [runs_.load_run(f) for f in folders]
    runs.append(runs_.load_run(fake_run(tmp_path / "random", "random")))
    groups = runs_.group_runs(runs_.name_runs(runs))
    low, high = "greedy weights.usage=0.3", "greedy weights.usage=0.7"
    assert {k: len(g) for k, g in groups.items()} == {low: 2, high: 2, "random": 1}
    tables.write_runs_csv(tmp_path / "runs.csv", runs)
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert [r["weights.usage"] for r in records] == ["0.3", "0.3", "0.7", "0.7", "0.5"]
    assert [r["seed"] for r in records] == ["0", "1", "0", "1", "0"]
    assert records[0]["rounds_to.0.35"] == "6" and records[0]["rounds_to.0.50"] == ""
    assert float(records[0]["final_global_accuracy"]) == 0.5


def test_labels_leave_out_what_most_configs_share(tmp_path):
    cases = [(0.3, 0.5), (0.5, 0.5), (0.5, 0.7), (0.5, 0.9)]
    folders = [
        fake_run(tmp_path / f"{fitness}-{usage}-{seed}", fitness=fitness, usage=usage)
        for fitness, usage in cases
        for seed in ((0, 1) if usage == 0.9 else (0,))  # seeds do not count
    ]
    named = runs_.name_runs([runs_.load_run(folder) for folder in folders])
    assert [run.label for run in named] == [
        "greedy weights.fitness=0.3 weights.usage=0.5",  # half of all is not most
        "greedy weights.usage=0.5",
        "greedy weights.usage=0.7",
        "greedy weights.usage=0.9",
        "greedy weights.usage=0.9",
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_spread_keeps_order_and_gap(places):
    places = np.array(places)
    moved = curves.spread(places, 0.05, 0.0, 1.0)
    assert np.all(np.diff(np.sort(moved)) >= 0.05 - 1e-9)
    assert np.all(np.diff(moved[np.argsort(places, kind="stable")]) > 0)
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-9


def test_spread_by_hand():
    moved = curves.spread(np.array([0.52, 0.9, 0.5]), 0.1, 0.0, 1.0)
    np.testing.assert_allclose(moved, [0.56, 0.9, 0.46])


def hand_rows(accuracy, load=(100, 100), **fields):
    """One evaluated row per accuracy; both experts alone are a tenth below it."""
    row = {"expert_load": list(load)} | fields
    alone = [[a - 0.1, a - 0.1] for a in accuracy]
    return [
        row | {"round": i + 1, "global_accuracy": a, "expert_accuracy": alone[i]}
        for i, a in enumerate(accuracy)
    ]


FLAT = [0.2, 0.4, 0.41, 0.41, 0.41, 0.41]
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
SWINGING = [0.1, 0.3, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4]
BALANCED = CONFIG | {"strategy": "load_balanced"}
BOTH = ["fitness", "usage"]


@pytest.mark.parametrize(
    ("accuracy", "load", "present"),
    [(FLAT, (900, 100), True), (FLAT, (500, 500), False), (RISING, (900, 100), False)],
)
def test_plateau(accuracy, load, present):
    arrays = {"times_held": np.array([[3, 0], [2, 1]])}
    found = signatures.plateau(hand_rows(accuracy, load), arrays, BALANCED, BOTH)
    assert found.present == present
    assert f"expert 0 trained {load[0] / 10:.1f} %" in found.evidence or not present
    assert "25 % of client-expert pairs never met" in found.evidence
    assert found.knob == ("weights.usage: raise (now 0.5)" if present else "")


@pytest.mark.parametrize(
    ("accuracy", "change", "present"),
    [(SWINGING, 0.2, True), (SWINGING, 0.01, False), (RISING, 0.2, False)],
)
def test_volatile(accuracy, change, present):
    rows = hand_rows(accuracy, fitness_change=change)
    found = signatures.volatile(rows, {}, BALANCED, BOTH)
    assert found.present == present
    assert found.knob == ("fitness.rate: lower (now 0.3)" if present else "")


@pytest.mark.parametrize(
    ("slowest", "late", "knob"),
    [
        (40.0, 0, ""),
        (40.0, 2, "devices.buffer: raise (now 0.1), or devices.deadline: raise"),
        (90.0, 0, "devices.deadline: lower (now 60.0)"),
    ],
)
def test_stragglers(slowest, late, knob):
    times = {"simulated_seconds": slowest, "simulated_median_seconds": 20.0}
    rows = hand_rows(RISING, late_clients=late, **times)
    found = signatures.stragglers(rows, {"capacity": np.array([1, 1, 3])}, CONFIG, BOTH)
    assert found.present == bool(knob)
    assert found.knob.startswith(knob)
    assert f"{slowest / 20:.1f} times" in found.evidence
    assert "2 clients can hold one expert or none" in found.evidence


@pytest.mark.parametrize(
    ("alone", "load", "present"),
    [(0.1, (950, 50), True), (0.1, (500, 500), False), (0.3, (950, 50), False)],
)
def test_stuck_expert(alone, load, present):
    rows = hand_rows(RISING, load)
    rows[0]["expert_accuracy"], rows[-1]["expert_accuracy"] = [0.1, 0.1], [0.5, alone]
    greedy = CONFIG | {"strategy": "greedy"}
    found = signatures.stuck_expert(rows, {}, greedy, ["fitness"])
    assert found.present == present
    assert "expert 1" in found.evidence
    assert ("greedy ignores usage" in found.knob) == present
    assert ("specialised?" in found.evidence) == (load[1] == 500)
    unsaid = signatures.stuck_expert(rows, {}, greedy, None)
    assert ("of use where greedy reads usage" in unsaid.knob) == present


def test_signatures_name_layer_and_expert():
    rows = hand_rows(FLAT, [[500, 500], [950, 50]])
    alone = [[0.1, 0.1], [0.1, 0.1]], [[0.5, 0.5], [0.5, 0.1]]
    for row in rows:
        row["expert_accuracy"] = alone[row["round"] == len(rows)]
    arrays = {"times_held": np.array([[[3, 0], [2, 1]]])}  # [N, G, E]
    found = signatures.plateau(rows, arrays, BALANCED, BOTH)
    assert "layer 1 expert 0 trained 95.0 % and layer 1 expert 1 5.0 %" in (
        found.evidence
    )
    assert "25 % of client-expert pairs never met" in found.evidence
    found = signatures.stuck_expert(rows, {}, BALANCED, BOTH)
    assert found.present and found.evidence == (
        "layer 1 expert 1 alone 10.0 % -> 10.0 %, 5.0 % of the load (fair: 50.0 %)"
    )


def test_a_summary_says_what_the_strategy_reads(tmp_path):
    folder = fake_run(tmp_path / "run")
    rows = hand_rows(FLAT, (900, 100))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw = lambda: report.write_report(tmp_path / "out", [runs_.load_run(folder)], "c")
    assert "of use where greedy reads usage" in draw().read_text(encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text())
    for reads, ignores in ((["fitness"], True), (["fitness", "usage"], False)):
        (folder / "summary.json").write_text(json.dumps(summary | {"reads": reads}))
        text = draw().read_text(encoding="utf-8")
        assert ("greedy ignores usage" in text) == ignores
        assert "of use where" not in text and "weights.usage: raise" in text


def test_too_few_rows_claim_nothing():
    for rows in ([], hand_rows(RISING[:3]), [{"round": 1}]):
        for found in signatures.check(rows, {}, CONFIG, BOTH):
            assert not found.present and not found.knob
            assert found.evidence.startswith(signatures.TOO_EARLY)


def test_overwrites_of_lists_the_fields_that_a_strategy_changes(tmp_path):
    quiet = runs_.load_run(fake_run(tmp_path / "run"))
    assert tables.overwrites_of([quiet]) == ""
    changed = {"gate.mode": "personal", "loss.calibration": 0.0}
    loud = quiet._replace(summary=quiet.summary | {"overwrites": changed})
    sentence = "Overwrites gate.mode=personal, loss.calibration=0.0."
    assert tables.overwrites_of([loud]) == sentence
    page = report.write_report(tmp_path / "page", [loud], "command").read_text()
    assert sentence in page
