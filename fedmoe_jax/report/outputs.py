"""Everything that a report consists of: page, tables and CSV files."""

import gc
import sys
from pathlib import Path

from fedmoe_jax.report.clients import write_clients_csv
from fedmoe_jax.report.page import write_report
from fedmoe_jax.report.paired_csv import write_paired_csv
from fedmoe_jax.report.runs import load_run
from fedmoe_jax.report.sections import markdown_tables
from fedmoe_jax.report.strata import write_strata_csv
from fedmoe_jax.report.tables import print_table, write_runs_csv
from fedmoe_jax.runtime.files import write_atomically


def write_all(folders: list[Path], workdir: Path, command: str, baseline: str) -> Path:
    """Writes the report of these runs, then prints its table; returns the page's path.

    Args:
      folders: of the runs.
      workdir: gets the files; it exists.
      command: see `write_report`.
      baseline: likewise.
    """
    gc.freeze()  # drawing makes garbage in plenty; what training has left stays
    gc.enable()
    runs = [load_run(folder) for folder in folders]
    write_runs_csv(workdir / "runs.csv", runs)
    write_clients_csv(workdir / "clients.csv", runs)
    write_strata_csv(workdir / "strata.csv", runs)
    write_paired_csv(workdir / "paired.csv", runs, baseline)
    write_atomically(workdir / "table.md", markdown_tables(runs, baseline))
    page = write_report(workdir, runs, command, baseline)
    print_table(runs, sys.stdout)
    return page
