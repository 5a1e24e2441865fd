"""The table of the units that clients keep, by hand."""

from fedmoe_jax.report.pruned import name_layers, pruned_section, take_shares

from .fake_runs import make_row, make_run

LAST = [[0.5, 0.25], [None, None], [1.0, 1.0]]


def make(tmp_path, rows, name="greedy", seed=0):
    return make_run(tmp_path, name, rows, seed=seed)


def test_take_shares_are_those_of_the_last_round(tmp_path):
    early = make_row(1, kept_by_capacity=[[0.1, 0.1]] * 3)
    run = make(tmp_path, [early, make_row(2, kept_by_capacity=LAST), make_row(3)])
    shares = take_shares(run)
    assert shares[0] == [0.5, 0.25] and shares[1][0] != shares[1][0]
    assert take_shares(make(tmp_path, [make_row(1)], seed=1)) == []


def test_name_layers_puts_the_moe_layers_last(tmp_path):
    one = make(tmp_path, [make_row(1, expert_load=[1.0, 2.0])])
    assert name_layers([one], 3) == ["Stem 0 %", "Stem 1 %", "Experts %"]
    two = make(tmp_path, [make_row(1, expert_load=[[1.0], [2.0]])], seed=1)
    assert name_layers([two], 2) == ["Experts 0 %", "Experts 1 %"]


def test_pruned_section_by_hand(tmp_path):
    other = [[0.7, 0.35], [None, None], [1.0, 1.0]]
    rows = lambda shares: [make_row(1, kept_by_capacity=shares, expert_load=[1.0, 1.0])]
    runs = [make(tmp_path, rows(LAST)), make(tmp_path, rows(other), seed=1)]
    runs.append(make(tmp_path, [make_row(1)], "random"))
    section = pruned_section(runs)
    (sheet,) = section.sheets
    assert sheet.heads == ("Strategy", "Stem 0 %", "Experts %")
    texts = {label: [cell.text for cell in row] for label, row in sheet.rows.items()}
    # Standard deviation sqrt(2) x 10 points of 50 and 70: 127.062 / 1.
    assert texts == {
        "greedy, room for 0": ["60.0 ± 127.1", "30.0 ± 63.5"],
        "greedy, room for 2": ["100.0 ± 0.0", "100.0 ± 0.0"],
    }
    assert pruned_section(runs[2:]) is None
