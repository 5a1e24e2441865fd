"""The pictures of one run's devices: their times, outcomes and capacities."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedmoe_jax.measures import OUTCOMES
from fedmoe_jax.options import Measure
from fedmoe_jax.report.clients import name_tiers
from fedmoe_jax.report.curves import Reference, curves
from fedmoe_jax.report.figures import Picture, measure_series
from fedmoe_jax.report.plots import COLOURS, participation_bars
from fedmoe_jax.report.runs import Run, num_experts
from fedmoe_jax.report.timeline import (
    SLOWEST_ROWS,
    Band,
    belief_bubbles,
    choose_rows,
    last_second,
    outcome_bands,
    timeline,
)

WORDS = {  # outcome: its name and its colour
    "merged": ("merged", "#CCCCCC"),
    "stale": ("late, merged a round later", COLOURS[5]),
    "dropped": ("late, dropped", COLOURS[0]),
    "lost_unreachable": ("not reachable", COLOURS[4]),
    "lost_dropout": ("dropped out", COLOURS[1]),
    "lost_memory": ("out of memory", COLOURS[3]),
    "lost_outage": ("link failed", COLOURS[2]),
    "nonfinite": ("broken update", COLOURS[6]),
}


def _round_time(run: Run) -> Iterator[Picture]:
    fields = {"simulated_seconds": "slowest", "simulated_median_seconds": "median"}
    lines = []
    for place, (field, name) in enumerate(fields.items()):
        lines += measure_series(place, name, [run], Measure(field))
    if any(np.nansum(line.values) > 0 for line in lines):
        deadline = (run.config["devices"]["deadline"], "deadline")
        yield Picture(
            "round_time",
            "Simulated time of a round's slowest and median client. A wide gap is "
            "time that the other devices wait; above the deadline clients are late.",
            curves(lines, "Simulated time (s)", deadline),
        )


def _last_round(run: Run) -> Iterator[Picture]:
    """The last round as a timeline; none where no device takes any time."""
    arrays = run.arrays
    if "last_phases" not in arrays or not arrays["last_phases"].any():
        return
    phases, spent = arrays["last_phases"].astype(float), arrays["last_spent"]
    rows = choose_rows(phases.sum(axis=1))
    names = [OUTCOMES[code] for code in arrays["last_code"][rows]]
    endings = ["" if name == "merged" else WORDS[name][0] for name in names]
    caption = (
        f"The last round of seed {run.config.get('seed')}, the slowest client on top; "
        "pale is what was planned and did not happen. Look for which phase fills the "
        "round, and for how few clients all the others wait."
    )
    if len(rows) < len(phases):
        caption += (
            f" Of {len(phases)} clients these are the {SLOWEST_ROWS} slowest and an "
            f"even sample of {len(rows) - SLOWEST_ROWS} others."
        )
    deadline = run.config["devices"]["deadline"]
    last = last_second(phases, spent, deadline)
    if phases.sum(axis=1).max() > last:
        caption += " Plans that meet the right edge go on beyond it."
    clients = list(map(str, arrays["last_client"][rows]))
    shown = (clients, phases[rows], spent[rows], endings, deadline, last)
    yield Picture("timeline", caption, timeline(*shown, of="Client"))


def _outcomes(run: Run) -> Iterator[Picture]:
    """Clients by outcome over rounds; none where all are merged in every round."""
    bands = []
    for name, (words, colour) in WORDS.items():
        counts = [float(row.get(f"{name}_clients") or 0.0) for row in run.rows]
        if any(counts):
            bands.append(Band(words, colour, np.array(counts)))
    if [band.name for band in bands] not in ([], ["merged"]):
        yield Picture(
            "outcomes",
            "Clients of each round by outcome. Grey counts at once; the "
            "rest came late or was lost with what it had cost. A broad band of one "
            "colour is the loss to mend first.",
            outcome_bands(np.array([row["round"] for row in run.rows]), bands),
        )


def _participation(run: Run) -> Iterator[Picture]:
    """Rounds in which clients counted; none where all counted equally often."""
    arrays = run.arrays
    counted = arrays.get("participation", np.zeros(1))
    if np.ptp(counted) > 0:
        yield Picture(
            "participation",
            "Clients by the number of rounds in which their update counted. Clients "
            "at zero are unknown to the model; a tier of its own on the left is "
            "left out.",
            participation_bars(
                counted,
                run.rows[-1]["round"],
                arrays["tier"],
                name_tiers(run),
            ),
        )


def _belief(run: Run) -> Iterator[Picture]:
    """Belief against true capacity; none where the server is never wrong."""
    arrays = run.arrays
    wrong = any(row.get("capacity_error") for row in run.rows)
    if wrong and "belief" in arrays and num_experts(run) > 1:
        yield Picture(
            "belief",
            "How many experts clients can truly hold, and how many the server believes "
            "they can, in the last round; numbers are clients. Orange, above the "
            "diagonal: overloaded if the server uses its belief, which is never less "
            "than one. Blue: room left unused, if only as a reserve.",
            belief_bubbles(arrays["capacity"], arrays["belief"]),
        )


def device_pictures(run: Run, *, alone: bool) -> Iterator[Picture]:
    """Pictures of the devices of one run, as far as its rows and arrays have them.

    Of a run that is not `alone` in its report, its times are in
    `compared_device_pictures`.
    """
    times = (_round_time, _last_round) if alone else ()
    for pictures in (*times, _outcomes, _participation, _belief):
        yield from pictures(run)


def _compared_times(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """Duration of every round by strategy; none where no device takes any time."""
    lines = []
    for place, (label, group) in enumerate(groups.items()):
        lines += measure_series(place, label, group, Measure("simulated_seconds"))
    if any(np.nansum(line.values) > 0 for line in lines):
        yield Picture(
            "round_time",
            "Simulated time of a round, which is that of its slowest client. Above the "
            "deadline clients are late.",
            curves(lines, "Simulated time (s)", _common_deadline(groups)),
        )


def _common_deadline(groups: Mapping[str, Sequence[Run]]) -> Reference:
    """The deadline as a level to compare with; None where runs have different ones."""
    runs = [run for group in groups.values() for run in group]
    deadlines = {run.config["devices"]["deadline"] for run in runs}
    return (deadlines.pop(), "deadline") if len(deadlines) == 1 else None


def _compared_last_round(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """The slowest client of every strategy's last round, by phase."""
    found = {}
    for label, (run, *_) in groups.items():
        phases = run.arrays.get("last_phases", np.zeros((0, 3)))
        if phases.any():
            slowest = choose_rows(phases.sum(axis=1))[0]
            found[label] = phases[slowest], run.arrays["last_spent"][slowest]
    if found:
        phases, spent = np.array(list(found.values()), float).swapaxes(0, 1)
        reference = _common_deadline(groups)
        deadline = np.inf if reference is None else reference[0]
        last = last_second(phases, spent, deadline)
        yield Picture(
            "timeline",
            "The slowest client of the last round, first seed; pale is what was "
            "planned and did not happen. Look for which phase fills the round.",
            timeline(
                list(found), phases, spent, [""] * len(found), deadline, last, of=""
            ),
        )


def compared_device_pictures(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """The times of several strategies' devices, in pictures that they share."""
    yield from _compared_times(groups)
    yield from _compared_last_round(groups)
