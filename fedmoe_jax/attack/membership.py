"""Attack: was an example trained on by a client, from the client's update?

Two attacks on the losses of `exposure`. Yeom et al. (arXiv 1709.01604): members have
lower losses. LiRA (Carlini et al., arXiv 2112.03570): the loss of an example is judged
against its losses in shadow runs with and without it, here the other seeds of a row, in
which the example is trained on by one client or set aside by one. As in the paper's
variant for few shadows all examples share their variances. That a shadow's update is
that of whichever client has the example there is this project's choice.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

NAN = float("nan")
FALSE_ALARMS = 0.01  # share of others that are taken for members
LEAST = 20  # members and others of an expert, of which anything is said


class Cases(NamedTuple):
    """The examples of all clients of ONE run that were looked at, [Q] each.

    Attributes:
      example: int, its number in the data.
      member: bool, whether its client trains on it.
      confidence: float, the logit of its likelihood, -loss - log(1 - exp(-loss)).
      expert: int, the expert that answers it.
    """

    example: np.ndarray
    member: np.ndarray
    confidence: np.ndarray
    expert: np.ndarray


class Found(NamedTuple):
    """How well members are told from others.

    Attributes:
      auc: 0.5 is chance.
      sure: share of members that are found at 1 % of false alarms, see `find_sure`.
      advantage: largest difference of found members and false alarms.
      cases: examples on which it is measured.
    """

    auc: float
    sure: float
    advantage: float
    cases: int


NOTHING = Found(NAN, NAN, NAN, 0)


def measure_confidence(loss: np.ndarray) -> np.ndarray:
    """The logit of the likelihood exp(-loss), nats, within what float32 tells apart."""
    loss = np.clip(loss.astype(float), 1e-6, 80.0)
    return -loss - np.log(-np.expm1(-loss))


def list_cases(exposed: Mapping[str, np.ndarray]) -> Cases:
    """The cases of a run, of clients that have taken part.

    Args:
      exposed: the arrays of `exposed.npz`, see `exposure`.
    """
    parts = []
    for name, member in ("member", True), ("other", False):
        example = exposed[f"{name}_example"]
        loss = exposed[f"{name}_loss"]
        counted = (example >= 0) & exposed["served"][:, None] & np.isfinite(loss)
        rows = example[counted], np.full(counted.sum(), member)
        expert = exposed[f"{name}_expert"][counted]
        parts.append(Cases(*rows, measure_confidence(loss[counted]), expert))
    return Cases(*map(np.concatenate, zip(*parts, strict=True)))


def find_sure(false: np.ndarray, true: np.ndarray, others: int) -> float:
    """The share of members that are found at 1 % of false alarms; 1 % by chance.

    Below the next of k false alarms among n others lies a share of (k + 1) / (n + 1) of
    all that is like them, on average, which counts here; NaN for less than 99 others,
    of which none is rare enough.

    Args:
      false: [points] share of others above each threshold, from 0 to 1.
      true: [points] share of members above it.
      others: n.
    """
    expected = (false * others + 1) / (others + 1)
    levels, first = np.unique(expected, return_index=True)
    most = np.maximum.reduceat(true, first)
    if levels[0] > FALSE_ALARMS:
        return NAN
    return float(np.interp(FALSE_ALARMS, levels, most))


def judge(score: np.ndarray, member: np.ndarray) -> Found:
    """How well scores [Q], larger for members, tell them; NaN is left out."""
    known = np.isfinite(score)
    score, member = score[known], member[known]
    if member.all() or not member.any():
        return NOTHING
    false, true, _ = roc_curve(member, score, drop_intermediate=False)
    return Found(
        auc=float(roc_auc_score(member, score)),
        sure=find_sure(false, true, int((~member).sum())),
        advantage=float((true - false).max()),
        cases=len(score),
    )


def average_shadows(
    shadows: Sequence[Cases], member: bool, count: int
) -> tuple[np.ndarray, float]:
    """The mean confidence of each example in shadows, [count], and their deviation.

    Args:
      shadows: of other runs.
      member: whether those with the example are meant, or those without.
      count: examples of the data.

    Returns:
      NaN for an example that no shadow has so, and the deviation within examples; that
      of all where no two shadows share an example.
    """
    chosen = [
        (s.example[s.member == member], s.confidence[s.member == member])
        for s in shadows
    ]
    example = np.concatenate([each[0] for each in chosen])
    values = np.concatenate([each[1] for each in chosen])
    seen = np.bincount(example, minlength=count)
    total = np.bincount(example, weights=values, minlength=count)
    mean = np.where(seen > 0, total / np.maximum(seen, 1), np.nan)
    left = values - mean[example]
    freedom = len(values) - (seen > 0).sum()
    spread = float(values.std()) if len(values) else NAN
    if freedom > 0:
        spread = float(np.sqrt((left**2).sum() / freedom))
    return mean, max(spread, 1e-6)


def compare_shadows(target: Cases, shadows: Sequence[Cases]) -> np.ndarray:
    """LiRA's score of each case [Q]: log likelihood as a member less as another.

    NaN for examples that shadows do not have both ways.
    """
    runs = [target, *shadows]
    count = max(int(each.example.max(initial=0)) for each in runs) + 1
    logs = []
    for member in (True, False):
        mean, spread = average_shadows(shadows, member, count)
        logs.append(norm.logpdf(target.confidence, mean[target.example], spread))
    return logs[0] - logs[1]


def attack_members(runs: Sequence[Cases]) -> list[dict[str, np.ndarray]]:
    """The scores of both attacks on every run of a row, `loss` and `lira`, [Q] each.

    `lira` is left out of a run without shadows.
    """
    found = []
    for place, target in enumerate(runs):
        shadows = [*runs[:place], *runs[place + 1 :]]
        scores = {"loss": target.confidence}
        if shadows:
            scores["lira"] = compare_shadows(target, shadows)
        found.append(scores)
    return found


def judge_experts(
    score: np.ndarray, cases: Cases, num_experts: int
) -> dict[int, Found]:
    """How well members are told among the examples of each expert, by its number.

    Experts with fewer than `LEAST` members or others are left out.
    """
    found = {}
    for expert in range(num_experts):
        mine = (cases.expert == expert) & np.isfinite(score)
        members = int(cases.member[mine].sum())
        if min(members, int(mine.sum()) - members) >= LEAST:
            found[expert] = judge(score[mine], cases.member[mine])
    return found


def judge_halves(
    score: np.ndarray, cases: Cases, holders: np.ndarray
) -> tuple[Found, Found]:
    """How well members are told in the rarer and in the more common half of the cases.

    Args:
      score: [Q].
      cases: of the run.
      holders: [E] float, holders of each expert in a round, on average; experts are
        taken in its order, and cases of an expert stay together.
    """
    order = np.argsort(holders, kind="stable")
    counts = np.bincount(cases.expert, minlength=len(holders))[order]
    before = np.cumsum(counts) - counts
    rare = np.isin(cases.expert, order[before + counts / 2 < len(score) / 2])
    return judge(score[rare], cases.member[rare]), judge(
        score[~rare], cases.member[~rare]
    )
