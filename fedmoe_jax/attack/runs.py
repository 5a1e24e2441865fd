"""All attacks on finished, observed runs, each as numbers of the run; on the host."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import xlogy
from scipy.stats import spearmanr

from fedmoe_jax.attack.histories import Observed, count_assignments, make_histories
from fedmoe_jax.attack.label_mix import Found, attack_mixes
from fedmoe_jax.attack.membership import (
    Cases,
    attack_members,
    judge,
    judge_experts,
    judge_halves,
    list_cases,
)
from fedmoe_jax.attack.similarity import attack_similarity
from fedmoe_jax.disclosure.observed import read_exposed, read_observed
from fedmoe_jax.report.runs import Run, group_runs, name_runs

Numbers = dict[str, float]
VIEWS = {"link": False, "server": True}  # whether the attacker has the reports, too


def mix_labels(run: Run) -> np.ndarray:
    """Each client's label mix in a run, [N, L], rows sum to 1."""
    counts = run.arrays["label_counts"].astype(float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)


def mix_groups(run: Run) -> np.ndarray | None:
    """Each client's mix of groups, [N, Q], see `data.groups`; None without groups."""
    if "group_names" not in run.arrays:
        return None
    mix = mix_labels(run)
    return mix.reshape(len(mix), len(run.arrays["group_names"]), -1).sum(axis=2)


def attack_views(observed: Observed, mix: np.ndarray) -> Iterator[tuple[str, Found]]:
    """How near each attack on a mix comes, by `mean`, or attacker and model.

    Arguments are those of `attack_histories`.
    """
    for view, feedback in VIEWS.items():
        history = make_histories(observed, len(mix), feedback)
        for model, near in attack_mixes(history, mix).items():
            yield model if model == "mean" else f"{view}_{model}", near


def attack_histories(observed: Observed, mix: np.ndarray) -> Numbers:
    """What the histories of a run give away, of label mixes and of similar clients.

    Args:
      observed: of the whole run.
      mix: [N, L], rows sum to 1.
    """
    found: Numbers = {}
    for where, near in attack_views(observed, mix):
        found[f"mix_distance_{where}"] = near.distance
        found[f"mix_majority_{where}"] = near.majority
    similar = attack_similarity(count_assignments(observed, len(mix)), mix)
    return found | {"pairs_auc": similar.auc, "pairs_spearman": similar.spearman}


def attack_groups(observed: Observed, mix: np.ndarray) -> Numbers:
    """What the histories of a run give away of clients' groups.

    Args:
      observed: of the whole run.
      mix: [N, Q], rows sum to 1; most of a client's data are of its group.
    """
    views = attack_views(observed, mix)
    found = {f"groups_{where}": near.majority for where, near in views}
    similar = attack_similarity(count_assignments(observed, len(mix)), mix)
    return found | {"groups_auc": similar.auc}


def count_holders(observed: Observed) -> np.ndarray:
    """Holders of each expert of the first layer in a round, on average, [E]."""
    return observed["held"][:, :, 0].sum(axis=1).mean(axis=0)


def measure_labels(specialisation: np.ndarray) -> float:
    """Normalised mutual information of experts and labels, in [0, 1].

    Of a label drawn uniformly and an expert drawn by its gate mass on the test examples
    with that label: twice their mutual information over the sum of their entropies, the
    mean over layers. 0 for one expert.

    Args:
      specialisation: [E, L] or [G, E, L] float >= 0.
    """
    layers = specialisation.reshape(-1, *specialisation.shape[-2:])
    found = []
    for mass in layers:
        joint = mass / max(mass.sum(), 1e-12)
        entropy = lambda p: -xlogy(p, p).sum()
        apart = entropy(joint.sum(0)) + entropy(joint.sum(1))
        shared = apart - entropy(joint)
        found.append(2 * shared / apart if apart > 1e-12 else 0.0)
    return float(np.mean(found))


def rank_experts(score: np.ndarray, cases: Cases, holders: np.ndarray) -> float:
    """Rank correlation of AUC and holders over the experts of a run, in [-1, 1].

    NaN with fewer than three experts that have enough examples, or equal holders.

    Args:
      score: of each case, more for a member.
      cases: of the run.
      holders: [E], see `count_holders`.
    """
    found = judge_experts(score, cases, len(holders))
    known = [expert for expert, each in found.items() if math.isfinite(each.auc)]
    counts = holders[known]
    if len(known) < 3 or np.ptp(counts) == 0:
        return math.nan
    return float(spearmanr(counts, [found[expert].auc for expert in known]).statistic)


def attack_updates(
    cases: Cases, scores: Mapping[str, np.ndarray], holders: np.ndarray
) -> Numbers:
    """What the updates of a run give away, of members.

    Args:
      cases: of the run.
      scores: of both attacks, see `membership.attack_members`.
      holders: [E], see `count_holders`.
    """
    found: Numbers = {}
    for name, score in scores.items():
        whole, halves = judge(score, cases.member), judge_halves(score, cases, holders)
        numbers = whole._asdict() | {
            "auc_rare": halves[0].auc,
            "auc_common": halves[1].auc,
            "auc_by_holders": rank_experts(score, cases, holders),
        }
        found |= {f"members_{name}_{key}": float(x) for key, x in numbers.items()}
    return found


def list_experts(
    cases: Cases, scores: Mapping[str, np.ndarray], holders: np.ndarray
) -> Iterator[dict[str, Any]]:
    """A record for each expert and attack of a run; arguments as in `attack_updates`.

    Experts with too few examples are left out.
    """
    for name, score in scores.items():
        for expert, found in judge_experts(score, cases, len(holders)).items():
            yield {
                "attack": name,
                "expert": expert,
                "holders": float(holders[expert]),
                **found._asdict(),
            }


def attack_runs(runs: Sequence[Run]) -> tuple[list[Numbers], list[list[dict]]]:
    """The numbers of every run, and its records of experts, in the order of the runs.

    Runs of one row are each other's shadows.

    Args:
      runs: finished and observed.
    """
    numbers: dict[str, Numbers] = {}
    experts: dict[str, list[dict]] = {}
    for group in group_runs(name_runs(runs)).values():
        exposed = {run.folder: read_exposed(run.folder) for run in group}
        cases = {f: list_cases(e) for f, e in exposed.items() if e is not None}
        cases = {folder: each for folder, each in cases.items() if len(each.member)}
        scores = dict(zip(cases, attack_members([*cases.values()]), strict=True))
        for run in group:
            observed, key = read_observed(run.folder), str(run.folder)
            assert observed is not None
            own = {"labels_known": measure_labels(run.arrays["specialisation"])}
            groups = mix_groups(run)
            # In groups a stratum is a class of a group, which sets clients apart.
            own |= (
                attack_histories(observed, mix_labels(run))
                if groups is None
                else attack_groups(observed, groups)
            )
            experts[key] = []
            if run.folder in cases:
                looked = cases[run.folder], scores[run.folder], count_holders(observed)
                own |= attack_updates(*looked)
                experts[key] = list(list_experts(*looked))
            numbers[key] = own
    folders = [str(run.folder) for run in runs]
    return [numbers[f] for f in folders], [experts[f] for f in folders]
