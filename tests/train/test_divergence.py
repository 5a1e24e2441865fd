"""Runs that diverge say so, for good."""

import io
import json

import numpy as np
import pytest
from factories import never, run_alone, tiny_config

from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.train.divergence import watch
from fedmoe_jax.train.writers import open_metrics, open_progress


def row(loss, broken=0, merged=20):
    return {
        "train_loss": loss,
        "nonfinite_clients": broken,
        "merged_clients": merged - broken,
    }


def look_at(rows, before=()):
    look = watch(list(before))
    return [look(one)["diverged"] for one in rows]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(2.3), row(1.0), row(0.1)], [0, 0, 0]),
        ([row(2.3), row(2.0, broken=9), row(2.0)], [0, 0, 0]),
        ([row(2.3), row(2.0, broken=10), row(2.0)], [0, 1, 1]),
        ([row(2.3), row(None, broken=20), row(2.0)], [0, 1, 1]),
        ([row(2.3), row(22.9), row(23.1), row(1.0)], [0, 0, 1, 1]),
        ([row(None, merged=0), row(2.0), row(19.0), row(21.0)], [0, 0, 0, 1]),
        ([row(np.nan, merged=0), row(2.0), row(21.0)], [0, 0, 1]),
    ],
)
def test_half_of_the_updates_broken_or_a_loss_that_runs_away(rows, expected):
    assert look_at(rows) == expected
    for cut in range(len(rows)):  # as a resumed run goes on
        flags = [{"diverged": flag} for flag in expected[:cut]]
        done = [one | flag for one, flag in zip(rows, flags, strict=False)]
        assert look_at(rows[cut:], done) == expected[cut:]


def test_rows_say_whether_the_run_has_diverged_also_when_it_is_resumed(tmp_path):
    found = []
    for done, losses in ((0, [2.0, 30.0]), (2, [1.0])):
        with open_metrics(tmp_path, done=done, tensorboard=False) as write:
            for number, loss in enumerate(losses, start=done + 1):
                found.append(write({"round": number} | row(loss))["diverged"])
    assert found == [0, 1, 1]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [one["diverged"] for one in rows] == found


def test_progress_names_what_has_diverged():
    stream = io.StringIO()
    with open_progress(2, ["one"], done=0, stream=stream) as update:
        for number, diverged in enumerate([0, 1], start=1):
            update([{"round": number, "global_accuracy": 0.1, "diverged": diverged}])
    first, second = stream.getvalue().splitlines()
    assert first.endswith("left 0:00") or "DIVERGED" not in first
    assert second.endswith("  DIVERGED")


@pytest.mark.slow
def test_a_run_at_an_impossible_rate_has_diverged_unless_it_clips(tmp_path):
    for clip, diverged in ((0.0, 1), (1e-6, 0)):
        config = tiny_config(**{"client.learning_rate": 1e4, "client.clip": clip})
        folder = tmp_path / str(clip)
        assert run_alone(config, folder, stop=never)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["diverged"] == diverged
