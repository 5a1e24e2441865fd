"""Traces of chunks: which ones, and that a trace which fails ends nothing."""

import jax
import jax.numpy as jnp
import pytest
from factories import tiny_config

from fedmoe_jax.train.trace import open_trace, record


def compute():
    return jnp.ones(3).sum().block_until_ready()


@pytest.fixture
def calls(monkeypatch):
    """Names of calls of JAX's profiler, which does nothing."""
    made = []
    start = lambda folder, **options: made.append("start")
    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


@pytest.mark.parametrize(
    ("done", "begun", "ended"),
    [(0, 2, 8), (10, 10, None), (2, 4, 10)],
)
def test_open_trace_takes_three_chunks_after_the_first(
    tmp_path, calls, done, begun, ended
):
    config = tiny_config(num_rounds=12, chunk_rounds=2, eval_every=2)
    seen = {}
    with open_trace(tmp_path / "profile", config, done) as trace:
        for at in range(done, 12, 2):
            trace(at)
            for call in calls:
                seen.setdefault(call, at)
    assert seen.get("start") == begun and seen.get("stop") == ended
    assert calls == ["start", "stop"]


def test_open_trace_without_a_folder_traces_nothing(calls):
    with open_trace(None, tiny_config(), 0) as trace:
        trace(0)
    assert calls == []


def test_record_keeps_a_trace(tmp_path, capsys):
    with record(tmp_path / "profile"):
        compute()
    assert list(tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    assert capsys.readouterr().err == ""


def test_record_goes_on_where_its_folder_is_a_file(tmp_path, capsys):
    (tmp_path / "profile").write_text("mine")
    with record(tmp_path / "profile"):
        assert compute() == 3
    told = capsys.readouterr().err
    assert told.startswith("warning: no trace in ") and told.count("\n") == 1
    assert (tmp_path / "profile").read_text() == "mine"


def test_record_leaves_no_half_of_a_trace_that_cannot_be_written(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "profile"
    earlier, half = (folder / "plugins/profile" / name for name in ("1", "2"))
    earlier.mkdir(parents=True)

    def fill_disk():
        half.mkdir()
        (half / "vm.xplane.pb").write_bytes(b"half")
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fill_disk)
    with pytest.raises(KeyError, match="of the run"), record(folder):
        raise KeyError("of the run")  # which the trace's own fault does not hide
    told = capsys.readouterr().err
    assert "RESOURCE_EXHAUSTED: No space" in told and told.count("\n") == 1
    assert earlier.is_dir() and not half.exists()


def test_record_goes_on_beside_another_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: pytest.fail("not ours"))

    def refuse(folder, **options):
        raise RuntimeError("Profile has already been started.")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    with record(tmp_path):
        assert compute() == 3
    assert "already been started" in capsys.readouterr().err
