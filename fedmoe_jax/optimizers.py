"""The optimisers of clients and server, all optax's."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from fedmoe_jax.moe_layers import LAYERED, layer_names
from fedmoe_jax.types import Array, PyTree


def client_optimizer(
    name: str, learning_rate: Array, momentum: float
) -> optax.GradientTransformation:
    """The local optimiser: `sgd` with momentum, or `adam`."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=momentum or None),
        "adam": lambda: optax.adam(learning_rate),
    }
    return table[name]()


def server_optimizer(name: str, learning_rate: Array) -> optax.GradientTransformation:
    """The server's transformation of the mean delta, seen as a negative gradient.

    Every part and every row of gates and experts has its own state, see `by_row`.
    """
    table = {
        "sgd": lambda: optax.sgd(learning_rate),
        "momentum": lambda: optax.sgd(learning_rate, momentum=0.9),
        "adam": lambda: optax.adam(learning_rate, b2=0.99, eps=1e-3),
        "yogi": lambda: optax.yogi(learning_rate, b2=0.99, eps=1e-3),
        "adagrad": lambda: optax.adagrad(learning_rate, eps=1e-3),
    }
    return by_row(table[name]())


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
