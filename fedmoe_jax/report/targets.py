"""Accuracies to which a report counts rounds and costs, the same for all its runs."""

from collections.abc import Sequence
from typing import NamedTuple

from fedmoe_jax.report.rows import own_final
from fedmoe_jax.report.runs import Run, group_runs, name_runs, num_experts

SHARES = (0.5, 0.8, 0.9, 0.95)  # of the best control's final global accuracy
ACCURACY = "global_accuracy"


class Target(NamedTuple):
    """One target.

    Attributes:
      key: of the numbers, after the name of what is counted, `rounds_to.0.35` say.
      value: accuracy in (0, 1].
      title: in percent, and of what it is a share.
      about: its definition; empty where the title says it all.
    """

    key: str
    value: float
    title: str
    about: str = ""


class Best(NamedTuple):
    """The best label: its mean final global accuracy, whether control or strategy."""

    label: str
    final: float
    kind: str


def find_targets(runs: Sequence[Run]) -> list[Target]:
    """The targets of runs that are compared, rising.

    Those that their configs have; where none has one, shares of the final global
    accuracy of `find_best`. Runs of which none is evaluated have no targets.
    """
    given = {
        float(target)
        for run in runs
        for target in run.config.get("evaluation", {}).get("targets", ())
    }
    if given:
        return [fix_target(value) for value in sorted(given)]
    best = find_best(runs)
    return [share_target(share, best) for share in SHARES] if best else []


def find_best(runs: Sequence[Run]) -> Best | None:
    """The control with the best mean final global accuracy over its seeds.

    A control trains a dense model, of one expert; without one the best strategy takes
    its place. None where no run is evaluated.
    """
    means = mean_finals(runs)
    controls = {run.label for run in name_runs(runs) if num_experts(run) == 1}
    rivals = means.keys() & controls or means.keys()
    if not rivals:
        return None
    best = max((label for label in means if label in rivals), key=means.__getitem__)
    return Best(best, means[best], "control" if best in controls else "strategy")


def mean_finals(runs: Sequence[Run]) -> dict[str, float]:
    """The mean final global accuracy of every label that is evaluated."""
    means = {}
    for label, group in group_runs(name_runs(runs)).items():
        finals = [own_final(run.rows, ACCURACY) for run in group]
        known = [final for final in finals if final is not None]
        if known:
            means[label] = sum(known) / len(known)
    return means


def fix_target(value: float) -> Target:
    """A target that a config has."""
    return Target(f"{value:.10g}", value, f"{100 * value:.10g} %")


def share_target(share: float, best: Best) -> Target:
    """A share of the best label's final global accuracy."""
    percent, value = f"{100 * share:.10g}", share * best.final
    return Target(
        f"{percent}_percent_of_best",
        value,
        f"{100 * value:.1f} % ({percent} % of best {best.kind})",
        f"the first evaluated round whose global accuracy is at least {percent} % of "
        f"{100 * best.final:.1f} %, the final one of {best.label}, the best "
        f"{best.kind}",
    )
