"""Metrics: what is written, what a resumed run drops, what the screen shows."""

import io
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.train import writers as metrics


def row(number: int, **more):
    return {"round": number, "train_loss": 1.0 / number, **more}


def write_rows(folder, rows, done=0, tensorboard=False):
    with metrics.open_metrics(folder, done=done, tensorboard=tensorboard) as write:
        for one in rows:
            write(one)


def is_given(name):
    """Whether a field is the run's own, no sum of costs and no verdict on it."""
    return name != "diverged" and not name.startswith("total_")


def read_rows(folder):
    """The rows as they were given."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in one.items() if is_given(k)} for one in rows]


def read_events(folder) -> list[Event]:
    """The events of every file in `folder`, from TFRecords: length, data, two sums."""
    events = []
    for path in sorted(
        folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns
    ):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_open_metrics_writes_strict_json(tmp_path):
    values = {
        "global_accuracy": jnp.float32(0.5),
        "expert_load": jnp.array([1.0, jnp.inf]),
        "load_cv": np.float64("nan"),
        "bytes_up": np.int64(2**40),
        "nested": {"a": (1, float("-inf"))},
    }
    write_rows(tmp_path, [row(1, **values)])
    (read,) = read_rows(tmp_path)
    assert read == {
        "round": 1,
        "train_loss": 1.0,
        "global_accuracy": 0.5,
        "expert_load": [1.0, None],
        "load_cv": None,
        "bytes_up": 2**40,
        "nested": {"a": [1, None]},
    }


def test_open_metrics_has_a_row_on_disk_at_once(tmp_path):
    with metrics.open_metrics(tmp_path, done=0, tensorboard=False) as write:
        write(row(1))
        assert read_rows(tmp_path) == [row(1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_metrics_makes_no_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    metrics.truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_open_metrics_drops_later_rows_of_a_resumed_run(tmp_path):
    write_rows(tmp_path, [row(n) for n in range(1, 6)])
    write_rows(tmp_path, [row(4, again=True)], done=3)
    assert read_rows(tmp_path) == [row(1), row(2), row(3), row(4, again=True)]


def test_open_metrics_empties_the_file_of_a_fresh_run(tmp_path):
    write_rows(tmp_path, [row(1), row(2)])
    write_rows(tmp_path, [row(1, new=1)], done=0)
    assert read_rows(tmp_path) == [row(1, new=1)]


def test_add_costs_goes_on_over_a_resume(tmp_path):
    costs = [row(n, bytes_up=10.0 * n, simulated_seconds=0.5) for n in (1, 2, 3, 4)]
    write_rows(tmp_path, costs)
    # Rounds 3 and 4 are done again, without traffic in the third.
    write_rows(tmp_path, [row(3, simulated_seconds=2.0), costs[3]], done=2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [one["total_bytes_up"] for one in rows] == [10, 30, 30, 70]
    assert [one["total_simulated_seconds"] for one in rows] == [0.5, 1, 3, 3.5]
    assert {one["total_wasted_flops"] for one in rows} == {0}


def test_add_costs_is_in_double_precision(tmp_path):
    # In float32 the second round would be lost: 2**24 + 1 is 2**24 there.
    sizes = [jnp.float32(2**24), jnp.float32(1)]
    write_rows(tmp_path, [row(i + 1, bytes_up=x) for i, x in enumerate(sizes)])
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["total_bytes_up"] == 2**24 + 1


@pytest.mark.parametrize("tail", [b'{"round": 3, "tr', b'{"round": 3}', b"\xff\xfe"])
def test_truncate_metrics_drops_an_unfinished_last_line(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write_rows(tmp_path, [row(1), row(2)])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read_rows(tmp_path) == [row(1), row(2)]
    metrics.truncate_metrics(path, 9)
    assert path.read_bytes() == whole


@given(
    done=st.integers(0, 12),
    rounds=st.lists(st.integers(1, 12), min_size=1, max_size=20),
)
def test_truncate_metrics_leaves_unique_sorted_rows(tmp_path_factory, done, rounds):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    lines = [json.dumps({"round": n, "at": i}) for i, n in enumerate(rounds)]
    path.write_text("\n".join(lines) + "\n")
    metrics.truncate_metrics(path, done)
    last = {n: i for i, n in enumerate(rounds)}
    expected = [{"round": n, "at": last[n]} for n in sorted(last) if n <= done]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


def test_open_metrics_gives_tensorboard_scalars_and_vectors(tmp_path):
    values = {"expert_load": jnp.array([3.0, 4.0, jnp.nan]), "held": np.ones((2, 2))}
    write_rows(tmp_path, [row(2, name="x", missing=None, **values)], tensorboard=True)
    found = {
        (value.tag, event.step): value.simple_value
        for event in read_events(tmp_path)
        for value in event.summary.value
        if is_given(value.tag)
    }
    assert found == {
        ("train_loss", 2): 0.5,
        ("expert_load/0", 2): 3.0,
        ("expert_load/1", 2): 4.0,
    }


def test_open_metrics_purges_events_of_a_resumed_run(tmp_path):
    write_rows(tmp_path, [row(n) for n in (1, 2, 3)], tensorboard=True)
    write_rows(tmp_path, [row(3)], done=2, tensorboard=True)
    purges = [
        event.step for event in read_events(tmp_path) if event.HasField("session_log")
    ]
    assert purges == [1, 3]


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def evaluated(number: int, **more):
    accuracy = {"global_accuracy": 0.4123, "personal_accuracy": jnp.float32(0.803)}
    return row(number, load_cv=0.123, **accuracy, **more)


def test_open_progress_prints_lines_without_a_terminal(clock):
    stream = io.StringIO()
    with metrics.open_progress(40, ["run"], done=0, stream=stream) as update:
        for number in range(1, 10):
            update([row(number)])
        clock[0] += 13.0
        update([evaluated(10)])
    assert stream.getvalue() == (
        "round 10/40  global 0.412  personal 0.803  load CV 0.12  "
        "1.3 s/round  left 0:39\n"
    )


def test_open_progress_shows_the_bits_of_text(clock):
    stream = io.StringIO()
    found = row(4, global_accuracy=0.25, personal_accuracy=0.5)
    found |= {"global_bits": 2.5, "personal_bits": 2.0}
    with metrics.open_progress(4, ["run"], done=0, stream=stream) as update:
        update([found])
    assert "global 2.500 bits  personal 2.000 bits  " in stream.getvalue()


def test_open_progress_names_several_runs_a_few_times(clock):
    stream = io.StringIO()
    with metrics.open_progress(40, ["a", "run"], done=0, stream=stream) as update:
        for number in range(1, 41):
            update([evaluated(number), evaluated(number)])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 * 6
    assert lines[0].startswith("a    round 1/40") and lines[1].startswith("run  round")
    assert [line.split()[2] for line in lines[::2]] == [
        f"{number}/40" for number in (1, 9, 17, 25, 33, 40)
    ]
    assert lines[-1].startswith("run  round 40/40")


def test_open_progress_shows_means_over_seeds(clock):
    names, stream = ["a-seed0", "a-seed12", "b-seed0"], io.StringIO()
    rows = [
        row(4, global_accuracy=0.25, personal_accuracy=0.5, load_cv=None),
        row(4, global_accuracy=0.5, personal_accuracy=None, load_cv=1.0, diverged=1.0),
        row(4, global_accuracy=1.0, personal_accuracy=1.0, load_cv=0.5, diverged=0.0),
    ]
    with metrics.open_progress(4, names, done=0, stream=stream) as update:
        update(rows)
    first, second = stream.getvalue().splitlines()
    shown = "a (2 seeds)  round 4/4  global 0.375  personal 0.500  load CV 1.00"
    assert first.startswith(shown) and first.endswith("DIVERGED 1 of 2")
    assert second.startswith("b            round 4/4  global 1.000")
    assert "DIVERGED" not in second


def test_open_progress_times_the_rounds_of_this_process(clock):
    stream = io.StringIO()
    with metrics.open_progress(1020, ["run"], done=10, stream=stream) as update:
        clock[0] += 40.0
        update([evaluated(20)])
    assert "round 20/1020" in stream.getvalue()
    assert stream.getvalue().endswith("4 s/round  left 1:06:40\n")


def test_open_progress_shows_dashes_for_what_is_not_measured(clock):
    stream = io.StringIO()
    with metrics.open_progress(4, ["run"], done=0, stream=stream) as update:
        update([row(4, global_accuracy=0.5, load_cv=None)])
    assert "personal -  load CV -  " in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_open_progress_shows_bars_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with metrics.open_progress(40, ["my run"], done=8, stream=stream) as update:
        update([evaluated(10)])
        update([row(11, load_cv=0.5)])
    last = stream.getvalue().split("my run")[-1]
    assert "11/40" in last and "load CV 0.50" in last
    assert "global 0.412  personal 0.803" in last  # still that of round 10
    assert "\x1b[" in stream.getvalue()


def test_open_progress_prints_lines_on_a_dumb_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with metrics.open_progress(40, ["my run"], done=0, stream=stream) as update:
        update([evaluated(40)])
    assert (
        stream.getvalue().startswith("round 40/40") and "\x1b" not in stream.getvalue()
    )
    assert stream.getvalue().endswith("left 0:00\n")


HOSTILE = ["[/q] [bold]$\\frac$ :smile:", "two\nlines\x1b[2J", "greedy-" + "x" * 500]


def test_open_progress_prints_names_of_users_as_they_are(clock):
    stream = io.StringIO()
    with metrics.open_progress(4, HOSTILE, done=0, stream=stream) as update:
        update([evaluated(4)] * len(HOSTILE))
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(HOSTILE)
    assert lines[0].startswith(HOSTILE[0]) and lines[1].startswith("two lines [2J ")
    assert all("round 4/4" in line[:120] for line in lines)


def test_open_progress_shows_names_of_users_beside_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with metrics.open_progress(4, HOSTILE, done=0, stream=stream) as update:
        update([evaluated(4)] * len(HOSTILE))
    assert HOSTILE[0] in stream.getvalue() and "two lines [2J" in stream.getvalue()
