"""Rows read back: damaged files in one line, and numbers by hand."""

import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.report import rows


def row(number: int, **more):
    return {"round": number, "train_loss": 1.0 / number, **more}


def test_read_metrics_without_a_file_is_empty(tmp_path):
    assert rows.read_metrics(tmp_path / "metrics.jsonl") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["oops", "[1]", '{"loss": 1}', '{"round": null}'])
def test_read_metrics_names_the_line_that_is_damaged(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"round": 1}}\n{bad}\n{{"round": 3}}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        rows.read_metrics(path)


def test_read_metrics_takes_the_last_of_equal_rounds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"round": 2, "x": 1}', '{"round": 1}', '{"round": 2, "x": 3}']
    path.write_text("\n".join(lines) + '\n{"round": 9}')  # the last has no line end
    assert rows.read_metrics(path) == [{"round": 1}, {"round": 2, "x": 3}]


def test_measured_adds_the_numbers_that_are_there():
    found = [row(1, x=1), row(2, x=None, y=2.5), row(3, x=[1.0]), row(4, x=1, y=2.5)]
    assert rows.measured(found, "x", "y") == [(1, 1), (2, 2.5), (4, 3.5)]
    assert rows.measured(found, "z") == []


def test_stack_experts_always_has_layers():
    found = [row(1, load=[1, 2]), row(2), row(3, load=None), row(4, load=[3, 4])]
    assert rows.stack_experts(found, "load").tolist() == [[[1, 2]], [[3, 4]]]
    layers = [row(1, load=[[1, 2], [3, 4], [5, 6]])]
    assert rows.stack_experts(layers, "load").shape == (1, 3, 2)
    assert rows.stack_experts([row(1)], "load").shape == (0, 1, 0)


def test_name_experts_counts_layers_where_there_are_several():
    assert rows.name_experts(1, 2) == ["expert 0", "expert 1"]
    names = ["layer 0 expert 0", "layer 1 expert 0"]
    assert rows.name_experts(2, 1) == names


def test_spend_so_far_counts_what_is_missing_as_nothing():
    found = [row(1, up=1.0, down=2.0), row(2, up=None), row(3, down=0.5)]
    np.testing.assert_array_equal(
        rows.spend_so_far(found, ("up", "down")), [3.0, 3.0, 3.5]
    )
    assert rows.spend_so_far([], ("up",)).shape == (0,)


ROWS = [
    row(1),
    row(2, global_accuracy=0.2),
    row(4, global_accuracy=0.7),
    row(6, global_accuracy=None),
    row(8, global_accuracy=0.6),
    row(10, global_accuracy=0.8),
]


@pytest.mark.parametrize(
    "target, expected",
    [(0.0, 2), (0.2, 2), (0.21, 4), (0.7, 4), (0.75, 10), (0.9, None)],
)
def test_rounds_to(target, expected):
    assert rows.rounds_to(ROWS, "global_accuracy", target) == expected


def test_own_final_is_the_mean_over_the_last_ten_rounds():
    late = [row(30, global_accuracy=0.2), row(31, global_accuracy=0.6)]
    late += [row(34), row(40, global_accuracy=0.8)]
    assert rows.own_final(late, "global_accuracy") == pytest.approx(0.7)
    # of 20 rounds only the last five
    short = [row(15, global_accuracy=0.2), row(16, global_accuracy=0.4)]
    short += [row(20, global_accuracy=0.8)]
    assert rows.own_final(short, "global_accuracy") == pytest.approx(0.6)
    assert rows.own_final(late[:1], "global_accuracy") == 0.2
    assert rows.own_final(late, "personal_accuracy") is None


def test_rounds_to_share_of_own_final():
    # The own final of 10 rounds is of the last 2.5: 0.7.
    assert rows.rounds_to_share(iter(ROWS), "global_accuracy", 0.95) == 4
    assert rows.rounds_to_share(ROWS, "global_accuracy", 1.1) == 10
    assert rows.rounds_to_share(ROWS, "personal_accuracy", 0.95) is None
