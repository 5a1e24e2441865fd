"""`paired.csv`: every difference that a report takes seed by seed."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmoe_jax.report.baseline import find_baseline, pair_with
from fedmoe_jax.report.origins import join_columns
from fedmoe_jax.report.paired import pair_labels
from fedmoe_jax.report.parts import list_parts
from fedmoe_jax.report.runs import Run, group_runs, name_runs
from fedmoe_jax.runtime.files import write_atomically

FIELDS = (
    "strategy",
    "baseline",
    "measure",
    "difference",
    "half_width",
    "pairs",
    "wins",
    "losses",
    "sign_test_p",
    "diverged",
)


def write_paired_csv(path: str | Path, runs: Sequence[Run], wanted: str) -> None:
    """One row per pair of labels and final measure.

    Those with the baseline come first, then those of systems in parts. No file where
    there is nothing to compare. A field is empty where the number is unknown. The last
    columns trace the runs of both labels, see `join_columns`.
    """
    baseline = find_baseline(runs, wanted)
    pairs = pair_with(baseline.label, runs) if baseline else []
    if not pairs:
        return
    pairs += [part.pair for part in list_parts(runs) if part.pair not in pairs]
    groups = group_runs(name_runs(runs))
    made_by = {
        pair: join_columns([*groups[pair[0]], *groups[pair[1]]]) for pair in pairs
    }
    traced = dict.fromkeys(name for columns in made_by.values() for name in columns)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*FIELDS, *traced])
    for key, found in pair_labels(runs, pairs).items():
        for pair, paired in found.items():
            values = ["" if np.isnan(x) else f"{x:.10g}" for x in paired]
            origin = [made_by[pair].get(name) for name in traced]
            writer.writerow([*pair, key, *values, *origin])
    write_atomically(Path(path), text.getvalue())
