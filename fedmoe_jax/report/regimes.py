"""Runs apart by what their clients and data are like, whatever the systems do."""

from collections.abc import Sequence

from fedmoe_jax.report.runs import (
    ABSENT,
    INCIDENTAL,
    Run,
    is_idle,
    usual_values,
    values_of,
)
from fedmoe_jax.runtime.files import flatten

# Config fields of what a system meets, be it as it is; it chooses the others.
GIVEN = (
    *("num_clients", "cohort_size", "num_rounds"),
    *("data.", "partition.", "groups.", "model.", "devices.", "late.", "channel."),
    *("pressure.", "background.", "bandwidth.", "availability.", "drift.", "profile."),
)
CHOSEN = ("model.shared_width", "model.tied", "model.remat", "model.scan")
UNCHANGED = "as usual"


def find_given(runs: Sequence[Run]) -> list[str]:
    """The fields of what systems meet in which runs differ and that one of them reads.

    Those that are incidental elsewhere are so here.
    """
    configs = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in names
        if name.startswith(GIVEN)
        and not name.startswith((*INCIDENTAL, *CHOSEN))
        and len({str(config.get(name, ABSENT)) for config in configs}) > 1
        and not all(is_idle(run, name) for run in runs)
    ]


def split_regimes(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every regime, by the values of its fields that most do not have.

    Args:
      runs: of one regime, named `as usual`, or of several.
    """
    fields = find_given(runs)
    usual = usual_values({values_of(run, fields) for run in runs}, fields)
    found: dict[str, list[Run]] = {}
    for run in runs:
        values = zip(fields, values_of(run, fields), strict=True)
        changes = [f"{f}={v}" for f, v in values if v != usual.get(f)]
        found.setdefault(" ".join(changes) or UNCHANGED, []).append(run)
    return found
