"""The optimisers of clients and server, optax's but for FedAdam, and their rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.moe_layers import LAYERED, layer_names
from fedmoe_jax.types import Array, Hyper, PyTree, Static

# Of the server's adaptive optimisers, as in arXiv 2003.00295, section 5.
SECOND_DECAY, ADAPTIVITY = 0.99, 1e-3


def client_optimizer(
    settings: Static, learning_rate: Array
) -> optax.GradientTransformation:
    """The local optimiser of ONE client's sub-model.

    Args:
      settings: `static.client`. Gradients are clipped to the norm `clip` over the whole
        sub-model, unless it is 0; `weight_decay` is part of them, but for `adamw`,
        which decays weights apart from its moments.
      learning_rate: [] float32.
    """
    decay = settings.weight_decay
    table = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=settings.momentum or None),
        "adam": lambda: optax.adam(learning_rate),
        "adamw": lambda: optax.adamw(learning_rate, weight_decay=decay),
    }
    tx = decay_first(table[settings.optimizer](), settings)
    return clip_first(tx, settings.clip)


def server_optimizer(
    settings: Static, learning_rate: Array
) -> optax.GradientTransformation:
    """The server's transformation of the mean delta, seen as a negative gradient.

    Every part and every row of gates and experts has its own state, see `by_row`.

    Args:
      settings: `static.server`. The norm `clip` is that of the whole mean delta;
        `weight_decay` as in `client_optimizer`.
      learning_rate: [] float32.
    """
    adaptive = dict(b2=SECOND_DECAY, eps=ADAPTIVITY)
    decay = settings.weight_decay
    table = {
        "sgd": lambda: optax.sgd(learning_rate),
        "momentum": lambda: optax.sgd(learning_rate, momentum=0.9),
        "adam": lambda: optax.adam(learning_rate, **adaptive),
        "adamw": lambda: optax.adamw(learning_rate, **adaptive, weight_decay=decay),
        "fedadam": lambda: fedadam(learning_rate),
        "yogi": lambda: optax.yogi(learning_rate, **adaptive),
        "adagrad": lambda: optax.adagrad(learning_rate, eps=ADAPTIVITY),
    }
    tx = decay_first(table[settings.optimizer](), settings)
    return clip_first(by_row(tx), settings.clip)


def decay_first(
    tx: optax.GradientTransformation, settings: Static
) -> optax.GradientTransformation:
    """`tx` of gradients with `weight_decay` times the weights, unless `tx` decays."""
    if not settings.weight_decay or settings.optimizer == "adamw":
        return tx
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), tx)


def clip_first(
    tx: optax.GradientTransformation, most: float
) -> optax.GradientTransformation:
    """`tx` of gradients that are scaled to the global norm `most`, if theirs is more.

    The state is that of `tx`. What is not finite stays so.
    """
    if not most:
        return tx
    clip = optax.clip_by_global_norm(most)

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple:
        return tx.update(clip.update(grads, clip.init(grads))[0], state, params)

    return optax.GradientTransformation(tx.init, update)


class Moments(NamedTuple):
    """FedAdam's moving averages, each like params.

    Attributes:
      mean: of the mean deltas.
      square: of their squares.
    """

    mean: PyTree
    square: PyTree


def fedadam(learning_rate: Array) -> optax.GradientTransformation:
    """FedAdam as published (arXiv 2003.00295, algorithm 2).

    Without Adam's correction of bias, and with squares that start at tau^2.
    """
    decay, square_decay, tau = 0.9, SECOND_DECAY, ADAPTIVITY

    def init(params: PyTree) -> Moments:
        square = lambda leaf: jnp.full_like(leaf, tau**2)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments(zeros, jax.tree.map(square, params))

    def update(grads: PyTree, state: Moments, params: PyTree = None) -> tuple:
        move = lambda old, new, keep: keep * old + (1 - keep) * new
        mean = jax.tree.map(lambda m, g: move(m, g, decay), state.mean, grads)
        square = jax.tree.map(
            lambda v, g: move(v, g * g, square_decay), state.square, grads
        )
        step = lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau)
        return jax.tree.map(step, mean, square), Moments(mean, square)

    return optax.GradientTransformation(init, update)


def rate_share(settings: Static, round: Array) -> Array:
    """The share of its learning rate that an optimiser takes in a round: [] in [0, 1].

    It climbs linearly over `warm_up` rounds, and falls along half a cosine to `floor`,
    which it has from round `cosine_rounds` on; 0 leaves either out.

    Args:
      settings: `static.client` or `static.server`.
      round: [] int32, rounds done. No optimiser's own count would do: clients' start
        anew every round, and experts' stand still while nobody trains them.
    """
    warm_up, cosine_rounds = settings.warm_up, settings.cosine_rounds
    start = 1 / (warm_up + 1)
    if not cosine_rounds:
        return jnp.asarray(optax.linear_schedule(start, 1.0, warm_up)(round))
    schedule = optax.warmup_cosine_decay_schedule(
        start, 1.0, warm_up, cosine_rounds, end_value=settings.floor
    )
    return jnp.asarray(schedule(round))


def schedule_rates(hyper: Hyper, round: Array, static: Static) -> Hyper:
    """Hyperparameters with the learning rates of one round, see `rate_share`."""
    for side in ("client", "server"):
        settings, numbers = getattr(static, side), getattr(hyper, side)
        if settings.warm_up or settings.cosine_rounds:
            rate = rate_share(settings, round) * numbers.learning_rate
            hyper = hyper._replace(**{side: numbers._replace(learning_rate=rate)})
    return hyper


def by_row(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for every part by itself, and in gates and experts for every row.

    What an expert has learnt of its gradients, and its count of steps, can so stand
    still while nothing trains it. The state is a dict like params: an optax state of
    each part, in gates and experts of each MoE layer, with leaves [E, ...].
    """

    def over_parts(function: Callable, *trees: PyTree) -> dict[str, Any]:
        def of_part(part: str) -> Any:
            parts = [tree[part] for tree in trees]
            if part not in LAYERED:
                return function(*parts)
            over_rows = jax.vmap(function)
            names = layer_names(parts[0])
            return {name: over_rows(*(tree[name] for tree in parts)) for name in names}

        return {part: of_part(part) for part in trees[0]}

    def take(found: dict[str, Any], place: int) -> PyTree:
        layers = lambda part: {name: pair[place] for name, pair in found[part].items()}
        return {
            part: layers(part) if part in LAYERED else found[part][place]
            for part in found
        }

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple:
        found = over_parts(tx.update, grads, state, params)
        return take(found, 0), take(found, 1)

    return optax.GradientTransformation(
        lambda params: over_parts(tx.init, params), update
    )


def add_prox(grads: PyTree, submodel: PyTree, received: PyTree, prox: Array) -> PyTree:
    """Adds the gradient of FedProx's `prox / 2 * |submodel - received|^2`.

    Written as a gradient, it fuses with the optimiser's pass over the params.
    """
    return jax.tree.map(lambda g, w, r: g + prox * (w - r), grads, submodel, received)


def step_weights(steps: Array, momentum: float) -> Array:
    """Sum over the steps of how often a gradient of local SGD is in the delta.

    The gradient of a step is in the momentum of all later ones; without momentum each
    counts once. FedNova's |a|_1 (arXiv 2007.07481, section 4).

    Args:
      steps: [...] int32 or float32, local steps.
      momentum: in [0, 1).
    """
    steps = steps.astype("float32")
    if momentum == 0:
        return steps
    tail = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - tail) / (1 - momentum)
