"""The files of a report are written before anything is printed."""

import csv
import sys

import pytest

from fedmoe_jax.report import outputs
from fedmoe_jax.report.outputs import write_all
from fedmoe_jax.runtime.output import wrap

from .fake_runs import write_run


def write_seeds(tmp_path):
    """Folders of two seeds, whose means have a half-width."""
    tops = (0.4, 0.6)
    return [write_run(tmp_path / f"{top}", "gr$e|dy", 0, top) for top in tops]


@pytest.mark.slow
def test_report_on_a_terminal_that_knows_ascii_alone(monkeypatch, tmp_path):
    folders, path = write_seeds(tmp_path), tmp_path / "terminal"
    with path.open("w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", wrap(terminal, pytest.fail))
        page = write_all(folders, tmp_path, "command", "")
        sys.stdout.flush()
    assert "50.0 +- 127.1" in path.read_text("ascii")
    assert page == tmp_path / "report.html" and page.exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_report_writes_all_files_before_it_prints(monkeypatch, tmp_path, count):
    folders = write_seeds(tmp_path)
    monkeypatch.setattr(outputs, "print_table", lambda runs, stream: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_all(folders[:count], tmp_path, "command", "")
    written = {"report.html", "runs.csv", "table.md", "clients.csv", "strata.csv"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as rows:
        assert len(list(csv.DictReader(rows))) == count
