"""The pictures of one run's devices: their times, outcomes and capacities."""

from collections.abc import Iterator

import numpy as np

from fedmoe_jax.measures import OUTCOMES
from fedmoe_jax.options import Measure
from fedmoe_jax.report.curves import curves
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
    shown = (arrays["last_client"][rows], phases[rows], spent[rows], endings)
    yield Picture("timeline", caption, timeline(*shown, deadline, last))


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
                arrays.get("tier_names", np.array(run.config["devices"]["tiers"])),
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


def device_pictures(run: Run) -> Iterator[Picture]:
    """Pictures of the devices of one run, as far as its rows and arrays have them."""
    for pictures in (_round_time, _last_round, _outcomes, _participation, _belief):
        yield from pictures(run)
