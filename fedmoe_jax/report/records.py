"""CSV files with several records for each finished run, such as one a client."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmoe_jax.report.origins import made_by_columns
from fedmoe_jax.report.runs import Run, name_folders, varied_fields
from fedmoe_jax.runtime.files import flatten, write_atomically


def write_records(
    path: str | Path,
    runs: Sequence[Run],
    fields: Sequence[str],
    list_records: Callable[[Run], Iterable[dict[str, Any]]],
) -> None:
    """One row per record: strategy, seed, varied config fields, `fields`, folder.

    Then what made the run, as in `runs.csv`. Writes nothing where no run is finished.

    Args:
      path: of the file.
      runs: finished or in progress.
      fields: of the records, in their order.
      list_records: the records of ONE run; one without a field leaves it empty.
    """
    if not any(run.arrays for run in runs):
        return
    varied, text = varied_fields(runs), io.StringIO(newline="")
    made_by = [made_by_columns(run) for run in runs]
    traced = dict.fromkeys(name for columns in made_by for name in columns)
    columns = ["strategy", "seed", *varied, *fields, "folder", *traced]
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for run, folder, made in zip(runs, name_folders(runs), made_by, strict=True):
        flat = flatten(run.config)
        name = {"strategy": flat["strategy"], "seed": flat.get("seed")}
        name |= {field: flat.get(field) for field in varied}
        name |= {"folder": folder} | made
        writer.writerows(name | record for record in list_records(run))
    write_atomically(Path(path), text.getvalue())
