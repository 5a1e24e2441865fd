"""Attack: which clients hold similar data, from their histories alone.

Similarity of two clients is the cosine of their assignment shares less the mean over
clients, so that experts that most hold say nothing; leaving the mean out is this
project's choice. The attacker knows no client's data.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr
from sklearn.metrics import roc_auc_score

NAN = float("nan")
DIGITS = 9  # of a cosine; beyond them equal ones would be ranked by their rounding


class Found(NamedTuple):
    """What similarity of histories says about similarity of data.

    Attributes:
      auc: the chance that a pair with the same most frequent label is more similar than
        one with different ones; 0.5 is chance.
      spearman: rank correlation of pairs' similarity in histories and label mixes.
    """

    auc: float
    spearman: float


def compare_rows(rows: np.ndarray) -> np.ndarray:
    """Cosines of rows [N, features] less their mean, [N, N]; 0 of rows without one."""
    moved = rows - rows.mean(axis=0, keepdims=True)
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    unit = np.where(length > 1e-12, moved / np.maximum(length, 1e-12), 0.0)
    return np.round(unit @ unit.T, DIGITS)


def share_out(rows: np.ndarray) -> np.ndarray:
    """Rows [N, features] >= 0 that sum to 1, so that capacities say nothing."""
    return rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-12)


def attack_similarity(history: np.ndarray, mix: np.ndarray) -> Found:
    """How well similar histories give away similar data.

    Args:
      history: [N, G E] float >= 0, shares of rounds, see `histories`.
      mix: [N, L], rows sum to 1.
    """
    pairs = np.triu_indices(len(history), k=1)
    by_history = compare_rows(share_out(history))[pairs]
    by_label = compare_rows(mix)[pairs]
    label = mix.argmax(axis=1)
    same = label[pairs[0]] == label[pairs[1]]
    auc = NAN
    if 0 < same.sum() < len(same):
        auc = float(roc_auc_score(same, by_history))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        correlation = spearmanr(by_history, by_label).statistic
    return Found(auc, float(correlation))
