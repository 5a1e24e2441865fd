"""Differences seed by seed, by hand, and what a report says of them."""

import csv

import pytest
from scipy.stats import binomtest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import UserError
from fedmoe_jax.report import paired
from fedmoe_jax.report.runs import load_run

from .fake_runs import make_row, make_run, write_run

KEY = "final_global_accuracy"
BASE = {0: 0.4, 1: 0.5, 2: 0.6}


def final_row(value, personal=0.5):
    return [make_row(1, global_accuracy=value, personal_accuracy=personal)]


def make_labels(tmp_path, **finals):
    """Runs of labels whose final global accuracies by seed are given."""
    return [
        make_run(tmp_path, label, final_row(value), seed=seed)
        for label, seeds in finals.items()
        for seed, value in seeds.items()
    ]


def seeds_of(values):
    return {seed: {KEY: value} for seed, value in values.items()}


def pair(ours, others=BASE, measure=MEASURES[KEY]):
    return paired.pair_up(seeds_of(ours), seeds_of(others), KEY, measure)


def test_pair_up_by_hand():
    # Differences of 10, 20 and 30 points: 20 ± 4.30265 * 10 / sqrt(3).
    found = pair({0: 0.5, 1: 0.7, 2: 0.9, 7: 0.1})
    assert found.mean == pytest.approx(20)
    assert found.half == pytest.approx(24.8414, abs=1e-3)
    assert found[2:] == (3, 3, 0, 0.25)


def test_pair_up_counts_equal_pairs_as_neither():
    found = pair({0: 0.4, 1: 0.6, 2: 0.5})
    assert (found.pairs, found.wins, found.losses, found.p) == (3, 1, 1, 1.0)
    less = pair({0: 0.4, 1: 0.6, 2: 0.7}, measure=MEASURES[KEY]._replace(better=-1))
    assert (less.wins, less.losses) == (0, 2)


def test_pair_up_without_a_common_seed_is_unknown():
    for ours in ({5: 0.4}, {0: float("nan")}):
        assert pair(ours)[2:5] == (0, 0, 0)
        assert paired.difference_cell(pair(ours), 1).text == "no pair"
    assert paired.difference_cell(pair({0: 0.5}), 1).text == "+10.0 (1 pair)"


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (1, 4), (3, 3), (2, 9)])
def test_sign_test_is_that_of_scipy(wins, losses):
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert paired.sign_test(wins, losses) == pytest.approx(p)


def test_difference_cell_is_bold_beyond_its_interval():
    cell = paired.difference_cell(pair({0: 0.5, 1: 0.61, 2: 0.69}), 1)
    assert cell.text == "+10.0 ± 2.5" and cell.bold
    cell = paired.difference_cell(pair({0: 0.2, 1: 0.3, 2: 0.7}), 1)
    assert cell.text == "-10.0 ± 43.0" and not cell.bold
    assert paired.difference_cell(pair(BASE), 1).text == "+0.0 ± 0.0"


def load_three(tmp_path):
    """A dense control that ends at 0.5 and two mixtures, two seeds each."""
    made = []
    for name, experts, tops in (
        ("fedavg", 1, (0.4, 0.6)),
        ("greedy", 4, (0.5, 0.8)),
        ("random", 4, (0.3, 0.5)),
    ):
        for seed, top in enumerate(tops):
            made.append(write_run(tmp_path / f"{name}{seed}", name, seed, top, experts))
    return [load_run(folder) for folder in made]


def test_the_baseline_is_the_best_control_or_the_one_that_is_named(tmp_path):
    runs = load_three(tmp_path)
    best = paired.find_baseline(runs, "")
    assert best.label == "fedavg" and "is the best control by its mean" in best.about
    named = paired.find_baseline(runs, "random")
    assert named.label == "random" and "evaluation.baseline names" in named.about
    absent = paired.find_baseline(runs, "fedprox")
    assert absent.label == "fedavg"
    assert absent.about.startswith("evaluation.baseline=fedprox names no row of this")
    assert paired.find_baseline([make_run(tmp_path, rows=[])], "") is None


def test_check_baseline_lists_the_rows(tmp_path):
    runs = make_labels(tmp_path, greedy=BASE, random=BASE)
    paired.check_baseline(runs, "random")
    with pytest.raises(UserError, match="'fedavg' is not allowed; .*: greedy, random$"):
        paired.check_baseline(runs, "fedavg")


def test_paired_section_has_a_table_for_each_final_measure(tmp_path):
    section = paired.paired_section(load_three(tmp_path), "")
    assert section.title == "Paired differences: less fedavg"
    titles = ["Global %", "Global soft %", "Personal %", "Worst decile %"]
    assert [sheet.title for sheet in section.sheets][:4] == titles
    rows = section.sheets[0].rows
    texts = {label: [cell.text for cell in cells] for label, cells in rows.items()}
    # 10 and 20 points: 15 ± 12.7062 * 5; -10 twice.
    assert texts == {
        "greedy": ["+15.0 ± 63.5", "2", "2 / 0", "0.5", "0.0 ± 0.0", "no data"],
        "random": ["-10.0 ± 0.0", "2", "0 / 2", "0.5", "0.0 ± 0.0", "no data"],
    }
    heads = section.sheets[0].heads
    assert heads[-2:] == ("Late clients a round", "Capacity violations a round")
    assert [cells[0].bold for cells in rows.values()] == [False, True]
    assert not any(cell.bold for cells in rows.values() for cell in cells[1:])


def test_paired_section_says_that_no_seed_is_common(tmp_path):
    runs = make_labels(tmp_path, greedy={0: 0.4}, random={1: 0.5})
    section = paired.paired_section(runs, "greedy")
    assert not section.sheets
    assert section.about.startswith("No row has a seed in common with greedy.")
    assert paired.paired_section(runs[:1], "") is None


def test_paired_section_keeps_rows_without_a_common_seed(tmp_path):
    finals = dict(greedy=BASE, random={7: 0.5}, round_robin={0: 0.5})
    section = paired.paired_section(make_labels(tmp_path, **finals), "greedy")
    texts = {k: [c.text for c in v] for k, v in section.sheets[0].rows.items()}
    assert texts["random"][:4] == ["no pair", "0", "–", "–"]
    assert texts["round_robin"][:4] == ["+10.0 (1 pair)", "1", "1 / 0", "1"]


def test_write_paired_csv_has_the_numbers_of_the_tables(tmp_path):
    path, runs = tmp_path / "paired.csv", load_three(tmp_path)
    paired.write_paired_csv(path, runs, "")
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    first = records[0]
    assert (first["strategy"], first["baseline"]) == ("greedy", "fedavg")
    assert first["measure"] == KEY and float(first["difference"]) == pytest.approx(15)
    assert float(first["half_width"]) == pytest.approx(63.531, abs=1e-3)
    counts = [first[name] for name in ("pairs", "wins", "losses", "sign_test_p")]
    assert counts == ["2", "2", "0", "0.5"]
    measures = {record["measure"] for record in records}
    assert len(measures) == len(paired.final_measures(runs))
    assert len(records) == 2 * len(measures)


def test_write_paired_csv_leaves_out_what_is_unknown(tmp_path):
    runs = make_labels(tmp_path, greedy={0: 0.4}, random={0: 0.5}, local={1: 0.5})
    paired.write_paired_csv(tmp_path / "paired.csv", runs, "greedy")
    lines = (tmp_path / "paired.csv").read_text().splitlines()
    assert lines[1].startswith("random,greedy,final_global_accuracy,10,,1,1,0,1")
    assert lines[2] == "local,greedy,final_global_accuracy,,,0,0,0,"
    paired.write_paired_csv(tmp_path / "none.csv", runs[:1], "")
    assert not (tmp_path / "none.csv").exists()
