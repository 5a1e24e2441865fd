"""Attack: the label mix of a client from its history.

The attacker knows the label mixes of the other clients of the run, its shadow clients,
and learns from them; in turn every client is the one that is attacked, in five folds.
That is more than most attackers know: what it finds is a bound for them. Views, models
and folds are this project's choice.
"""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDS = 5
PENALTIES = np.logspace(-2, 4, 13)


class Found(NamedTuple):
    """How near the attack comes, over all clients.

    Attributes:
      distance: mean total variation between true and found label mixes, in [0, 1].
      majority: share of the clients whose most frequent label is found.
    """

    distance: float
    majority: float


def make_ridge():
    """Ridge regression, its penalty chosen among the shadow clients."""
    return make_pipeline(StandardScaler(), RidgeCV(PENALTIES))


def make_mlp():
    """A small network, for what is not linear."""
    network = MLPRegressor(
        hidden_layer_sizes=(16,),
        alpha=1.0,
        solver="lbfgs",
        max_iter=200,
        random_state=0,
    )
    return make_pipeline(StandardScaler(), network)


MODELS = {"ridge": make_ridge, "mlp": make_mlp}


def to_mix(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Numbers [n, L] as shares that sum to 1; `usual` [L] where none is positive."""
    kept = np.maximum(values, 0.0)
    total = kept.sum(axis=1, keepdims=True)
    return np.where(total > 0, kept / np.where(total > 0, total, 1.0), usual[None])


def judge(found: np.ndarray, mix: np.ndarray) -> Found:
    """Label mixes [N, L] as an attack finds them, against the true ones."""
    distance = np.abs(found - mix).sum(axis=1) / 2
    right = found.argmax(axis=1) == mix.argmax(axis=1)
    return Found(float(distance.mean()), float(right.mean()))


def find_mixes(history: np.ndarray, mix: np.ndarray, model: str | None) -> np.ndarray:
    """The label mix of each client as found from the others, [N, L].

    Args:
      history: [N, features].
      mix: [N, L], rows sum to 1.
      model: a name of `MODELS`; None for the mean of the other clients' mixes.
    """
    found = np.zeros_like(mix)
    for shadow, target in KFold(FOLDS, shuffle=True, random_state=0).split(history):
        usual = mix[shadow].mean(axis=0)
        found[target] = usual
        if model is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                learnt = MODELS[model]().fit(history[shadow], mix[shadow])
            values = learnt.predict(history[target])
            found[target] = to_mix(values.reshape(len(target), -1), usual)
    return found


def attack_mixes(history: np.ndarray, mix: np.ndarray) -> dict[str, Found]:
    """How near each model comes, and `mean`, which knows no history; {} of few clients.

    Arguments are those of `find_mixes`.
    """
    if len(history) < 2 * FOLDS:
        return {}
    return {
        name or "mean": judge(find_mixes(history, mix, name), mix)
        for name in (None, *MODELS)
    }
