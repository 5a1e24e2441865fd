"""Rows read back: damaged files in one line, and numbers by hand."""

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.report import rows


def row(number: int, **more):
    return {"round": number, "train_loss": 1.0 / number, **more}


def test_no_file_is_no_rows(tmp_path):
    assert rows.read_metrics(tmp_path / "metrics.jsonl") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["oops", "[1]", '{"loss": 1}', '{"round": null}'])
def test_damage_within_is_reported_with_its_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"round": 1}}\n{bad}\n{{"round": 3}}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        rows.read_metrics(path)


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


def test_rounds_to_targets():
    found = rows.rounds_to_targets(iter(ROWS), "global_accuracy", (0.5, 0.75, 1.0))
    assert found == {0.5: 4, 0.75: 10, 1.0: None}


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
