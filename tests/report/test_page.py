"""Pages: whole, self-contained and made without JAX."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedmoe_jax.options import UserError
from fedmoe_jax.report import page as report
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.runs import load_run

from .fake_runs import (
    ARRAYS,
    ROWS,
    change_summary,
    load_runs,
    make_run,
    make_text_run,
    stop_run,
    write_rows,
    write_run,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return load_runs(tmp_path_factory.mktemp("runs"))


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


def test_write_report_compares_strategies(runs, tmp_path):
    text, figures = check_page(report.write_report(tmp_path, runs, "python x <y>"))
    assert "python x &lt;y&gt;" in text and "greedy &lt;needs&gt;" in text
    assert {"final_accuracy", "global_accuracy", "load_cv", "partition"} <= figures
    assert "greedy-specialisation" in figures
    assert "fedavg-load" not in figures  # one expert has no balance to show


def test_columns_stand_under_their_headings_and_burdens_under_each(runs, tmp_path):
    text = report.write_report(tmp_path, runs, "c").read_text(encoding="utf-8")
    parts = re.split(r"<h3>(At the end|On the way|Costs)</h3>", text)
    tables = dict(zip(parts[1::2], parts[2::2], strict=True))
    columns = {
        heading: re.findall(r"<th>(.*?)</th>", table.split("</table>")[0])
        for heading, table in tables.items()
    }
    for heading, title in {
        "At the end": "Personal %",
        "On the way": "Load CV",
        "Costs": "MB up a round",
    }.items():
        assert [h for h, titles in columns.items() if title in titles] == [heading]
    assert all("Late clients a round" in titles for titles in columns.values())


def test_write_report_of_a_single_run(runs, tmp_path):
    text, figures = check_page(report.write_report(tmp_path, runs[2:3], "c"))
    assert "fitness.rate = 0.3" in text
    alignment = {"load", "expert_accuracy", "pairs", "specialisation"}
    assert figures == alignment | {
        "accuracy",
        "accuracy_time",
        "accuracy_traffic",
        "load_cv",
        "expert_group_information",
        "partition",
        "capacity",
        "round_time",
    }


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_write_report_of_a_run_in_progress(tmp_path, num_rows):
    run = load_run(stop_run(write_run(tmp_path / "run"), num_rows))
    path = report.write_report(tmp_path / "out", [run], "c")
    assert "too early to tell" in path.read_text(encoding="utf-8")


def test_write_report_of_rows_without_optional_fields(tmp_path, runs):
    bare = [{"round": 1, "seconds": 0.1}, {"round": 2, "global_accuracy": None}]
    run = runs[2]._replace(rows=bare, summary={}, arrays={})
    assert report.write_report(tmp_path, [run, runs[3]], "c").exists()


def add_layers(folder, num_layers):
    """Gives the files of a run with one MoE layer several.

    Expert e of layer g has (g + 1) times the fitness of expert e of layer 0.
    """
    rows = load_run(folder).rows
    for row in rows:
        for name in {"expert_load", "expert_accuracy"} & row.keys():
            row[name] = [row[name]] * num_layers
    write_rows(folder, rows)
    with np.load(folder / "final.npz") as stored:
        arrays = dict(stored)
    layers = np.arange(1, num_layers + 1)
    arrays["fitness"] = arrays["fitness"][:, None] * layers[:, None]  # [N, G, E]
    arrays["times_held"] = np.stack([arrays["times_held"]] * num_layers, axis=1)
    arrays["specialisation"] = np.stack([arrays["specialisation"]] * num_layers)
    np.savez(folder / "final.npz", **arrays)
    return folder


def test_write_report_of_several_layers(tmp_path):
    run = load_run(add_layers(write_run(tmp_path / "run"), 3))
    one = load_run(write_run(tmp_path / "one", "random"))
    text, figures = check_page(report.write_report(tmp_path / "out", [run, one], "c"))
    alignment = {"load", "expert_accuracy", "pairs", "specialisation"}
    assert {f"greedy-{name}" for name in alignment} <= figures
    assert "columns sum to 100 % in every layer." in text


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


def test_write_report_imports_no_jax_and_no_model(tmp_path):
    folders = [str(write_run(tmp_path / name, name)) for name in ("greedy", "random")]
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
    allowed = {"measures", "options", "runtime"}
    allowed |= {f"runtime.{name}" for name in ("files", "names", "seals")}
    assert rooms == {"fedmoe_jax", *(f"fedmoe_jax.{name}" for name in allowed)}


def test_write_report_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="no run; allowed: one"):
        report.write_report(tmp_path / "out", [], "c")


def test_figures_have_names_of_their_own_whatever_the_labels(runs, tmp_path):
    labels = ("../a/b", "a:b", "A:b", "x" * 300)
    each = zip(runs[2:3] * len(labels), labels, strict=True)
    relabelled = [run._replace(label=label) for run, label in each]
    _, figures = check_page(report.write_report(tmp_path / "out", relabelled, "c"))
    assert len({name.lower() for name in figures}) == len(figures)
    assert sum(name.endswith("-specialisation") for name in figures) == len(labels)
    assert all(len(name) <= 100 for name in figures)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Accuracy stands still while one of two experts trains a tenth.
FLAT = [
    {
        "round": at,
        "expert_load": [900, 100],
        "global_accuracy": accuracy,
        "expert_accuracy": [accuracy - 0.1] * 2,
    }
    for at, accuracy in enumerate([0.2, 0.4, 0.41, 0.41, 0.41, 0.41], start=1)
]


def test_write_report_says_what_the_strategy_reads(tmp_path):
    folder = write_run(tmp_path / "run")
    write_rows(folder, FLAT)
    draw = lambda: report.write_report(tmp_path / "out", [load_run(folder)], "c")
    assert "of use where greedy reads usage" in draw().read_text(encoding="utf-8")
    for reads, ignores in ((["fitness"], True), (["fitness", "usage"], False)):
        change_summary(folder, reads=reads)
        text = draw().read_text(encoding="utf-8")
        assert ("greedy ignores usage" in text) == ignores
        assert "of use where" not in text and "weights.usage: raise" in text


def test_write_report_says_what_the_strategy_overwrites(tmp_path):
    quiet = load_run(write_run(tmp_path / "run"))
    changed = {"gate.mode": "personal", "loss.calibration": 0.0}
    loud = quiet._replace(summary=quiet.summary | {"overwrites": changed})
    page = report.write_report(tmp_path / "page", [loud], "command").read_text()
    assert "Overwrites gate.mode=personal, loss.calibration=0.0." in page


def test_write_report_says_the_limit_of_text(tmp_path):
    made = make_text_run(tmp_path), make_run(tmp_path, "random")
    pages = [report.write_report(tmp_path / run.label, [run], "c") for run in made]
    told = "limit of any model on the whole test text, but for chance: 1.750 bits"
    found = [told in path.read_text(encoding="utf-8") for path in pages]
    assert found == [True, False]


def test_write_report_shows_costs(tmp_path):
    made = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    names = ("capacity", "belief", "tier", "participation")
    one = {name: ARRAYS[name][:1] for name in names}
    made.insert(0, make_run(tmp_path, "centralised", ROWS[:2], ARRAYS | one))
    path = report.write_report(tmp_path / "out", made, "c")
    text = path.read_text(encoding="utf-8")
    assert "<h2>Against time and traffic</h2>" in text
    assert "<b>Lost a round</b>: clients whose update did not count" in text
    # Final numbers, signatures; pairs; budgets of two accuracies; four targets.
    assert text.count("<th>Strategy</th>") == 3 + 1 + 1 + 2 + 4
    assert "<h2>Paired differences: less centralised</h2>" not in text
    figures = {each.stem for each in (path.parent / "figures").glob("*.png")}
    assert {"global_accuracy_time", "personal_accuracy_traffic"} <= figures
    # The clients are shown of a run that has them, not of the pooled one.
    assert {"capacity_error", "capacity", "timeline", "greedy-belief"} <= figures


def test_the_header_lists_what_differs(runs, tmp_path):
    config = runs[0].config | {"partition": {"kind": "iid"}, "num_clients": 9}
    other = runs[0]._replace(config=config)
    text = report.write_report(tmp_path, [*runs, other], "c").read_text("utf-8")
    assert (
        "Data: digits, dirichlet or iid partition · 6 or 9 clients, 6 a round" in text
    )


def test_rows_of_one_strategy_are_in_the_title_and_fields_have_pictures(tmp_path):
    runs = []
    for csi in (0.5, 0.7, 1.0):
        run = make_run(tmp_path, "greedy", ROWS)
        channel = {"kind": "wireless", "csi": csi}
        runs.append(run._replace(config=run.config | {"channel": channel}))
    text = report.write_report(tmp_path / "page", runs, "c").read_text("utf-8")
    assert "<h1>Comparison on digits</h1>" in text and "<h2>By config</h2>" in text
    assert (tmp_path / "page/figures/channel_csi-final_global_accuracy.png").is_file()
    text = report.write_report(tmp_path / "page", runs[1:], "c").read_text("utf-8")
    title = "greedy channel.csi=0.7 against greedy channel.csi=1.0 on digits"
    assert f"<h1>{title}</h1>" in text and "By config" not in text


def test_a_pictures_text_is_what_its_caption_begins_with():
    named = lambda caption: report.name_picture(Picture("x", caption, Figure()))
    assert named("Final accuracies: a dot per seed. Read it so.") == "Final accuracies"
    assert named("Test accuracy. Global: all experts.") == "Test accuracy"
    assert named("Load of the experts.") == "Load of the experts"
