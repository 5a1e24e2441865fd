"""`paired.csv`: every difference that a report takes seed by seed."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmoe_jax.report.baseline import find_baseline, pair_with
from fedmoe_jax.report.paired import pair_labels
from fedmoe_jax.report.parts import list_parts
from fedmoe_jax.report.runs import Run
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
    there is nothing to compare. A field is empty where the number is unknown.
    """
    baseline = find_baseline(runs, wanted)
    pairs = pair_with(baseline.label, runs) if baseline else []
    if not pairs:
        return
    pairs += [part.pair for part in list_parts(runs) if part.pair not in pairs]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(FIELDS)
    for key, found in pair_labels(runs, pairs).items():
        for pair, paired in found.items():
            values = ["" if np.isnan(x) else f"{x:.10g}" for x in paired]
            writer.writerow([*pair, key, *values])
    write_atomically(Path(path), text.getvalue())
