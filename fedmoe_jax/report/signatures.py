"""The failure signatures of the paper, found in a run's own data.

Every check takes the rows of `metrics.jsonl`, the arrays of `final.npz` (a dict, empty
while a run is in progress), the config as a nested dict, and which evidence the
strategy reads: fitness, usage, both or none; None where that is unknown.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedmoe_jax.report.rows import Row, name_experts, stack_experts

Arrays = Mapping[str, np.ndarray]
Config = Mapping[str, Any]
Reads = Sequence[str] | None

# Two means of two evaluations each, so that no single evaluation decides.
MIN_EVALUATIONS = 4
# Less than this in the last half of a run is what repeated evaluations differ by.
PLATEAU_GAIN = 0.01
# At 0.3 an ordinary expert has trained about a third more or less than its fair share;
# FLEX-MoE (arXiv 2512.23070) reports more than 0.29 for greedy assignment.
UNEVEN_LOAD_CV = 0.3
# Three points between evaluations are far above the 0.5 points (one standard
# deviation) to which 10 000 test images measure an accuracy.
ACCURACY_SWING = 0.03
# With the default rate of 0.3 a change of 0.05 a round means that the feedback
# contradicts the score by 0.17; settled scores move by about 0.01.
FITNESS_CHANGE = 0.05
# A synchronous round that lasts three times the median client wastes most devices.
SLOWEST_TO_MEDIAN = 3.0
# One round in ten with a client over the deadline is more than bad luck.
LATE_ROUNDS = 0.1
MIN_ROUNDS = 5
# An expert that gains less than this alone has not learnt; see PLATEAU_GAIN.
NO_GAIN = 0.01
# Half of the fair share 1 / E of the load; below it an expert is starved.
STARVED_SHARE = 0.5
TOO_EARLY = "too early to tell"  # how the evidence begins where data is missing


class Signature(NamedTuple):
    """One failure signature.

    Attributes:
      name: of the failure, as in the paper.
      present: whether this run shows it; False where there is too little data.
      evidence: the numbers that decided, or the data that is missing.
      knob: the config field to turn and the direction; empty where not present.
      condition: when the failure counts as present, whatever else went wrong.
    """

    name: str
    present: bool
    evidence: str
    knob: str
    condition: str


PLATEAU = (
    f"global accuracy gains less than {100 * PLATEAU_GAIN:g} point over the last half, "
    f"and the CV of the total load is above {UNEVEN_LOAD_CV:g}. A run that stands "
    "still under an even load, as every model of one expert does, is not named"
)
VOLATILE = (
    f"global accuracy moves more than {100 * ACCURACY_SWING:g} points per evaluation "
    "about its trend in the last half, whether fitness moves or not"
)
STRAGGLERS = (
    f"the slowest client takes over {SLOWEST_TO_MEDIAN:g} times the median's time, or "
    f"over {100 * LATE_ROUNDS:g} % of the rounds have a client past the deadline"
)
STUCK = (
    f"an expert alone gains less than {100 * NO_GAIN:g} point over the run and has "
    f"less than {STARVED_SHARE:g} of its fair share of the load. One that does not "
    "gain in spite of enough load is not named"
)


def plateau(
    rows: Sequence[Row], arrays: Arrays, config: Config, reads: Reads
) -> Signature:
    """Accuracy plateaus early while the experts are trained unevenly."""
    name = "Accuracy plateaus early"
    accuracy, shares = _column(rows, "global_accuracy"), share_load(rows)
    if len(accuracy) < MIN_EVALUATIONS or not shares.size:
        what = "evaluations with expert load"
        return _too_little(name, what, len(accuracy), PLATEAU)
    half = len(accuracy) // 2
    gain = accuracy[-2:].mean() - accuracy[half - 2 : half].mean()
    uneven = shares.std() / max(shares.mean(), 1e-9)
    names, shares = name_experts(*shares.shape), shares.ravel()
    most, least = int(shares.argmax()), int(shares.argmin())
    evidence = (
        f"global accuracy gains {100 * gain:+.1f} points over the last half, to "
        f"{100 * accuracy[-2:].mean():.1f} %"
    )
    if len(shares) > 1:
        evidence += (
            f"; CV of the total load {uneven:.2f}; "
            f"{names[most]} trained {100 * shares[most]:.1f} % and {names[least]} "
            f"{100 * shares[least]:.1f} % of all examples"
        )
    if "times_held" in arrays:
        never = 100 * np.mean(np.asarray(arrays["times_held"]) == 0)
        evidence += f"; {never:.0f} % of client-expert pairs never met"
    present = gain < PLATEAU_GAIN and uneven > UNEVEN_LOAD_CV
    knob = _knob(config, "weights.usage", "raise") + _need(config, reads, "usage")
    return Signature(name, bool(present), evidence, knob if present else "", PLATEAU)


def volatile(
    rows: Sequence[Row], arrays: Arrays, config: Config, reads: Reads
) -> Signature:
    """Accuracy swings from evaluation to evaluation; the knob is of what moves it.

    Where fitness is read and does not settle that is its rate, else the clients'.
    """
    name = "High round-to-round variance"
    accuracy = _column(rows, "global_accuracy")
    late_rows = rows[len(rows) // 2 :]
    change = _column(late_rows, "fitness_change")
    if len(accuracy) < MIN_EVALUATIONS:
        return _too_little(name, "evaluations", len(accuracy), VOLATILE)
    # The first half climbs; what is left after the trend of the last half is swing.
    steps = np.diff(accuracy[(len(accuracy) - 1) // 2 :])
    swing = np.abs(steps - steps.mean()).mean()
    evidence = (
        f"in the last half, global accuracy moves {100 * swing:.1f} points per "
        "evaluation about its trend"
    )
    if len(change):
        evidence += f"; fitness moves {change.mean():.3f} per round"
    switches = _column(late_rows, "assignment_change")
    if len(switches):
        evidence += f"; {100 * switches.mean():.0f} % of held pairs are new"
    present = swing > ACCURACY_SWING
    restless = len(change) > 0 and change.mean() > FITNESS_CHANGE
    if restless and (reads is None or "fitness" in reads):
        knob = _knob(config, "fitness.rate", "lower") + _need(config, reads, "fitness")
    else:
        knob = _knob(config, "client.learning_rate", "lower")
    return Signature(name, bool(present), evidence, knob if present else "", VOLATILE)


def stragglers(
    rows: Sequence[Row], arrays: Arrays, config: Config, reads: Reads
) -> Signature:
    """Rounds wait for their slowest client, or clients miss the deadline."""
    name = "Frequent stragglers or timeouts"
    slowest = _column(rows, "simulated_seconds")
    median = _column(rows, "simulated_median_seconds")
    late = _column(rows, "late_clients")
    if min(len(slowest), len(late)) < MIN_ROUNDS or len(median) != len(slowest):
        what = "rounds with device times"
        return _too_little(name, what, len(slowest), STRAGGLERS, MIN_ROUNDS)
    ratio = float(np.median(slowest / np.maximum(median, 1e-9)))
    late_rounds = (late > 0).mean()
    evidence = (
        f"the slowest client takes {ratio:.1f} times the median client's time; "
        f"{100 * late_rounds:.0f} % of rounds have a late client, "
        f"{late.mean():.1f} clients per round"
    )
    if "capacity" in arrays:
        smallest = int(np.sum(np.asarray(arrays["capacity"]) <= 1))
        evidence += f"; {smallest} clients can hold one expert or none"
    if late_rounds > LATE_ROUNDS:
        knob = (
            _knob(config, "devices.buffer", "raise")
            + ", or "
            + _knob(config, "devices.deadline", "raise")
        )
    elif share_load(rows).size == 1:
        knob = _knob(config, "model.expert_width", "lower") + ", as the model is dense"
    else:
        knob = (
            _knob(config, "devices.deadline", "lower")
            + " so that slow clients get fewer experts"
        )
    present = late_rounds > LATE_ROUNDS or ratio > SLOWEST_TO_MEDIAN
    return Signature(name, bool(present), evidence, knob if present else "", STRAGGLERS)


def stuck_expert(
    rows: Sequence[Row], arrays: Arrays, config: Config, reads: Reads
) -> Signature:
    """An expert never improves because it is hardly ever trained."""
    name = "An expert never improves"
    alone, shares = stack_experts(rows, "expert_accuracy"), share_load(rows)
    if len(alone) < MIN_EVALUATIONS or alone.shape[1:] != shares.shape:
        return _too_little(name, "evaluations of single experts", len(alone), STUCK)
    names, fair = name_experts(*shares.shape), 1 / shares.shape[1]
    alone, shares = alone.reshape(len(alone), -1), shares.ravel()
    gain = alone[-1] - alone[0]
    still = gain < NO_GAIN
    stuck = still & (shares < STARVED_SHARE * fair)
    shown = np.flatnonzero(stuck) if stuck.any() else [int(gain.argmin())]
    evidence = "; ".join(
        f"{names[e]} alone {100 * alone[0, e]:.1f} % -> {100 * alone[-1, e]:.1f} %, "
        f"{100 * shares[e]:.1f} % of the load (fair: {100 * fair:.1f} %)"
        for e in shown
    )
    if (still & ~stuck).any():
        others = ", ".join(names[e] for e in np.flatnonzero(still & ~stuck))
        evidence += f"; no gain in spite of enough load: {others} (specialised?)"
    knob = _knob(config, "weights.usage", "raise") + _need(config, reads, "usage")
    knob += '; fitness.idle: "prior"; ' + _knob(config, "fitness.exploration", "raise")
    present = bool(stuck.any())
    return Signature(name, present, evidence, knob if present else "", STUCK)


CHECKS = (plateau, volatile, stragglers, stuck_expert)


def check(
    rows: Sequence[Row], arrays: Arrays, config: Config, reads: Reads
) -> list[Signature]:
    """All signatures of one run, in the paper's order."""
    return [find(rows, arrays, config, reads) for find in CHECKS]


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    """The finite numbers of one field, in the order of the rows."""
    values = np.array([row[name] for row in rows if row.get(name) is not None], float)
    return values[np.isfinite(values)]


def share_load(rows: Sequence[Row]) -> np.ndarray:
    """[G, E] share of its layer's examples that each expert trained; [1, 0] if none."""
    load = stack_experts(rows, "expert_load").sum(axis=0)
    return load / np.maximum(load.sum(axis=-1, keepdims=True), 1e-9)


def _too_little(
    name: str, what: str, found: int, condition: str, needed: int = MIN_EVALUATIONS
) -> Signature:
    evidence = f"{TOO_EARLY}: {found} {what} so far, at least {needed} needed"
    return Signature(name, False, evidence, "", condition)


def _knob(config: Config, field: str, turn: str) -> str:
    group, leaf = field.split(".")
    return f"{field}: {turn} (now {config[group][leaf]})"


def _need(config: Config, reads: Reads, evidence: str) -> str:
    """A warning where the strategy may ignore the evidence that the knob weighs."""
    strategy = config["strategy"]
    if reads is None:
        return f"; of use where {strategy} reads {evidence}"
    if evidence in reads:
        return ""
    return f"; {strategy} ignores {evidence}, choose a strategy that reads it"
