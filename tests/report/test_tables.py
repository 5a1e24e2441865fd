"""Runs side by side: cells, columns and best numbers by hand."""

import csv
import io
import re

import pytest

from fedmoe_jax.report import tables
from fedmoe_jax.report.runs import load_run

from .fake_runs import NOTHING, load_runs, make_row, make_run, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return load_runs(tmp_path_factory.mktemp("runs"))


def titles_of(columns):
    return [column.title for column in columns]


def cells_of(table, label):
    columns, rows = table
    return dict(zip(titles_of(columns), rows[label], strict=True))


def test_table_never_calls_no_traffic_and_no_devices_best(tmp_path):
    silent = [make_row(n, **NOTHING) for n in (1, 2)]
    cheap = [make_row(n, bytes_up=1e6, radio_joules=50.0) for n in (1, 2)]
    made = [make_run(tmp_path, "local", silent), make_run(tmp_path, "greedy")]
    two = tables.table(made)
    three = tables.table([*made, make_run(tmp_path, "random", cheap)])
    assert cells_of(three, "local")["MB up a round"].text == "0.0 (1 seed)"
    assert cells_of(three, "local")["kJ"].text == "does not apply"
    for title in ("MB up a round", "kJ"):
        best = [label for label in three[1] if cells_of(three, label)[title].bold]
        assert best == ["random"]
        # With one rival only there is no comparison.
        assert not any(cells_of(two, label)[title].bold for label in two[1])


def test_table_leaves_out_columns_that_say_nothing(tmp_path):
    losses = {"Lost a round", "Stale a round", "Capacity error", "Wasted MB %"}
    losses |= {"Jain of participation"}
    columns, _ = tables.table([make_run(tmp_path)])
    assert losses | {"Simulated min", "kJ"} <= set(titles_of(columns))
    calm = dict(lost_memory_clients=0.0, capacity_violations=0, wasted_bytes=0.0)
    calm |= {"participation_jain": 1.0}
    rows = [make_row(n, **calm) for n in (1, 2)]  # the error 0.5 is always the same
    columns, _ = tables.table([make_run(tmp_path, rows=rows)])
    titles = set(titles_of(columns))
    assert not losses & titles and "kJ" in titles
    # That no device is asked for too much is worth saying.
    assert {"Late clients a round", "Capacity violations a round"} <= titles


def test_table_has_the_perplexity_of_text_beside_its_bits(tmp_path):
    """Of each seed, then the mean: of 1 and 3 bits 2 and 8, not 2 ** 2."""
    seeds = [
        make_run(tmp_path, rows=[make_row(1, global_bits=bits)], seed=seed)
        for seed, bits in enumerate((1.0, 3.0))
    ]
    done = [run._replace(summary={"num_rounds": 1}) for run in seeds]
    made = tables.table(done)
    # t(0.975, 1) is 12.7062, and the deviation of 2 and 8 over sqrt(2) is 3.
    assert cells_of(made, "greedy")["Global perplexity"].text == "5.00 ± 38.12"
    titles = titles_of(made[0])
    assert titles[titles.index("Global, bits") + 1] == "Global perplexity"
    assert "Global perplexity" not in titles_of(tables.table(seeds)[0])
    images = make_run(tmp_path)._replace(summary={"num_rounds": 4})
    assert "Global perplexity" not in titles_of(tables.table([images])[0])


def test_every_table_has_late_clients_and_violations_of_dense_controls(tmp_path):
    rows = [make_row(1, expert_load=[2.0], capacity_violations=3, late_clients=5.0)]
    calm = [make_row(1, capacity_violations=0, late_clients=0.0)]
    runs = [make_run(tmp_path, "fedavg", rows), make_run(tmp_path, "greedy", calm)]
    titles, cells = tables.pick_cells(runs, tables.EVERYWHERE)
    assert titles == ["Late clients a round", "Capacity violations a round"]
    texts = {label: [cell.text for cell in row] for label, row in cells.items()}
    assert texts["fedavg"] == ["5.0 (1 seed)", "3.0 (1 seed)"]
    assert texts["greedy"] == ["0.0 (1 seed)", "0.0 (1 seed)"]
    stream = io.StringIO()
    tables.print_table(runs, stream)
    assert "5.0 (1 seed)" in stream.getvalue() and "3.0 (1 seed)" in stream.getvalue()
    assert all(title in tables.markdown_table(runs) for title in titles)


def test_table_has_the_servers_own_training_and_the_cost_of_an_answer(tmp_path):
    answers = dict(answer_flops=36_506.0, soft_answer_flops=152_538.0)
    spent = [make_row(n, server_flops=f, **answers) for n, f in ((1, 5e8), (2, 0.0))]
    dense = dict(answer_flops=43_343.0, soft_answer_flops=43_343.0)
    plain = [make_row(n, server_flops=0.0, **dense) for n in (1, 2)]
    runs = [make_run(tmp_path, "fedjets", spent), make_run(tmp_path, "fedavg", plain)]
    titles = "Server GFLOP", "kFLOP an answer", "kFLOP a soft answer"
    found = {
        label: [cells_of(tables.table(runs), label)[title].text for title in titles]
        for label in ("fedjets", "fedavg")
    }
    assert found == {
        "fedjets": ["0.50 (1 seed)", "36.5 (1 seed)", "152.5 (1 seed)"],
        "fedavg": ["0.00 (1 seed)", "43.3 (1 seed)", "43.3 (1 seed)"],
    }
    tables.write_runs_csv(tmp_path / "runs.csv", runs)
    with (tmp_path / "runs.csv").open(newline="") as file:
        row, _ = csv.DictReader(file)
    assert (row["server_gigaflops"], row["answer_kiloflops"]) == ("0.5", "36.506")
    assert row["soft_answer_kiloflops"] == "152.538"
    # Where no server trains, the column says nothing.
    assert "Server GFLOP" not in titles_of(tables.table(runs[1:])[0])


def test_table_has_a_column_of_jain_where_labels_differ(tmp_path):
    uneven = [make_row(1, participation_jain=0.7)]
    same = [make_run(tmp_path, label) for label in ("greedy", "random")]
    assert "Jain of participation" not in titles_of(tables.table(same)[0])
    both = [same[0], make_run(tmp_path, "random", uneven)]
    assert cells_of(tables.table(both), "greedy")["Jain of participation"].bold


def test_table_marks_best(runs):
    made = tables.table(runs)
    cells = {label: cells_of(made, label) for label in made[1]}
    # 0.4 and 0.6: half-width is 12.7062 * 0.141421 / sqrt(2) = 1.27.
    assert cells["greedy"]["Global %"].text == "50.0 ± 127.1"
    assert cells["random"]["Global %"].text == "40.0 (1/2 seeds)"
    best = [label for label in cells if cells[label]["Global %"].bold]
    assert best == ["fedavg", "greedy"]
    assert not any(row["MB up a round"].bold for row in cells.values())  # all equal
    assert cells["fedavg"]["Load CV"].text == "does not apply"
    assert cells["greedy"]["Load CV"].text == "0.30 ± 0.00"
    assert cells["greedy"]["MB up a round"].text == "2.0 ± 0.0"
    # 0.4 * 8 / 8 reaches 80 % of fedavg's 0.5 in round 8; 0.6 * 6 / 8 in round 6.
    title = "Rounds to 40.0 % (80 % of best control)"
    assert cells["greedy"][title].text == "7 (2/2)"
    about = next(column.about for column in made[0] if column.title == title)
    assert "at least 80 % of 50.0 %, the final one of fedavg, the best control" in about


def test_table_tells_what_does_not_apply_from_what_is_unknown(tmp_path):
    dense = make_run(tmp_path, "fedavg", [make_row(1, expert_load=[2.0])])
    made = tables.table([make_run(tmp_path, "greedy", [make_row(1)]), dense])
    early, control = cells_of(made, "greedy"), cells_of(made, "fedavg")
    assert early["Global %"].text == control["Global %"].text == "no data"
    assert early["Load CV"].text == "no data"
    assert control["Load CV"].text == "does not apply"


def test_only_what_learns_reaches_its_own_final_accuracy(tmp_path):
    # Five classes: 0.2 + 0.15 * 0.8 = 0.32.
    folders = [
        write_run(tmp_path / name, name, 0, top)
        for name, top in (("greedy", 0.33), ("random", 0.31))
    ]
    runs = [load_run(folder) for folder in folders]
    made, title = tables.table(runs), "Rounds to 95 % of own final"
    assert cells_of(made, "greedy")[title].text == "8 (1/1)"
    assert cells_of(made, "random")[title].text == "– (0/1)"
    about = next(column.about for column in made[0] if column.title == title)
    assert "15 % of the way from chance to 100 %" in about
    tables.write_runs_csv(tmp_path / "runs.csv", runs)
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        rounds = [row["rounds_to_95_percent_of_final"] for row in csv.DictReader(file)]
    assert rounds == ["8", ""]


def test_overwrites_of_lists_the_fields_that_a_strategy_changes(tmp_path):
    quiet = make_run(tmp_path)
    assert tables.overwrites_of([quiet]) == ""
    changed = {"gate.mode": "personal", "loss.calibration": 0.0}
    loud = quiet._replace(summary={"overwrites": changed})
    sentence = "Overwrites gate.mode=personal, loss.calibration=0.0."
    assert tables.overwrites_of([loud]) == sentence


def test_print_table_has_the_printed_columns_alone(runs):
    stream = io.StringIO()
    tables.print_table(runs, stream)
    text = stream.getvalue()
    at = text.index("fedavg")
    head, lines = text[:at], text[at:].splitlines()
    titles = [column.title for column in tables.table(runs)[0] if column.printed]
    words = {word for title in titles for word in title.split()}
    assert words <= set(head.split()) and {"Late", "violations"} <= words
    assert set(head.split()) <= words | {"Strategy", "Seeds", "Rates"}
    strategies = [line.split()[:2] for line in lines if line.strip()]
    assert strategies == [["fedavg", "2"], ["greedy", "2"], ["random", "2"]]
    assert "50.0 ± 127.1" in lines[1]


def test_markdown_table(runs):
    lines = tables.markdown_table(runs).splitlines()
    assert len(lines) == 2 + 3
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(columns) == {columns[0]}
    assert "**50.0 ± 127.1**" in lines[3] and "`greedy`" in lines[3]


def test_write_runs_csv_has_varied_fields(tmp_path):
    folders = [
        write_run(tmp_path / f"{usage}-{seed}", "greedy", seed, usage=usage)
        for usage in (0.3, 0.7)
        for seed in (0, 1)
    ]
    folders.append(write_run(tmp_path / "random", "random"))
    tables.write_runs_csv(tmp_path / "runs.csv", [load_run(f) for f in folders])
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert [r["weights.usage"] for r in records] == ["0.3", "0.3", "0.7", "0.7", "0.5"]
    assert [r["seed"] for r in records] == ["0", "1", "0", "1", "0"]
    reached = [records[0][f"rounds_to.{n}_percent_of_best"] for n in (50, 80, 90, 95)]
    assert reached == ["4", "8", "8", "8"]  # 0.5 * 4 / 8, no control
    assert float(records[0]["final_global_accuracy"]) == 0.5


def test_rates_are_tuned_or_not(tmp_path):
    plain = make_run(tmp_path)
    tuned = plain._replace(config=dict(plain.config) | {"tuned": "global_accuracy"})
    assert tables.rates_of([plain, plain]) == "untuned"
    assert tables.rates_of([tuned, tuned]) == "tuned"
    assert tables.rates_of([tuned, plain]) == "tuned in part"
    assert "| untuned |" in tables.markdown_table([plain])
