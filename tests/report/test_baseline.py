"""The baseline of a report, and the differences of the other rows to it."""

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.report import baseline

from .fake_runs import load_three, make_labels, make_run

BASE = {0: 0.4, 1: 0.5, 2: 0.6}


def test_the_baseline_is_the_best_control_or_the_one_that_is_named(tmp_path):
    runs = load_three(tmp_path)
    best = baseline.find_baseline(runs, "")
    assert best.label == "fedavg" and "is the best control by its mean" in best.about
    named = baseline.find_baseline(runs, "random")
    assert named.label == "random" and "evaluation.baseline names" in named.about
    absent = baseline.find_baseline(runs, "fedprox")
    assert absent.label == "fedavg"
    assert absent.about.startswith("evaluation.baseline=fedprox names no row of this")
    assert baseline.find_baseline([make_run(tmp_path, rows=[])], "") is None


def test_check_baseline_lists_the_rows(tmp_path):
    runs = make_labels(tmp_path, greedy=BASE, random=BASE)
    baseline.check_baseline(runs, "random")
    with pytest.raises(UserError, match="'fedavg' is not allowed; .*: greedy, random$"):
        baseline.check_baseline(runs, "fedavg")


def test_paired_section_has_a_column_for_each_final_measure(tmp_path):
    section = baseline.paired_section(load_three(tmp_path), "")
    assert section.title == "Paired differences: less fedavg"
    (sheet,) = section.sheets
    titles = ("Global %", "Global soft %", "Personal %", "Worst decile %")
    assert sheet.heads[:6] == ("Strategy", "Pairs", *titles)
    rows = sheet.rows
    texts = {
        label: [cell.text for cell in (*cells[:2], *cells[-2:])]
        for label, cells in rows.items()
    }
    # 10 and 20 points: 15 ± 12.7062 * 5; -10 twice.
    assert texts == {
        "greedy": ["2", "+15.0 ± 63.5; 2 / 0, p 0.5", "0.0 ± 0.0", "no data"],
        "random": ["2", "-10.0 ± 0.0; 0 / 2, p 0.5", "0.0 ± 0.0", "no data"],
    }
    assert sheet.heads[-2:] == ("Late clients a round", "Capacity violations a round")
    assert [cells[1].bold for cells in rows.values()] == [False, True]
    assert not any(cells[0].bold or cells[-1].bold for cells in rows.values())


def test_paired_section_says_that_no_seed_is_common(tmp_path):
    runs = make_labels(tmp_path, greedy={0: 0.4}, random={1: 0.5})
    section = baseline.paired_section(runs, "greedy")
    assert not section.sheets
    assert section.about.startswith("No row has a seed in common with greedy.")
    assert baseline.paired_section(runs[:1], "") is None


def test_paired_section_keeps_rows_without_a_common_seed(tmp_path):
    finals = dict(greedy=BASE, random={7: 0.5}, round_robin={0: 0.5})
    section = baseline.paired_section(make_labels(tmp_path, **finals), "greedy")
    texts = {k: [c.text for c in v] for k, v in section.sheets[0].rows.items()}
    assert texts["random"][:2] == ["0", "no pair"]
    assert texts["round_robin"][:2] == ["1", "+10.0 (1 pair); 1 / 0, p 1"]
