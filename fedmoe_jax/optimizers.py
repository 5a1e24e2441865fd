"""The optimisers of clients and server, all optax's."""

import jax
import optax

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
    """The server's transformation of the mean delta, seen as a negative gradient."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate),
        "momentum": lambda: optax.sgd(learning_rate, momentum=0.9),
        "adam": lambda: optax.adam(learning_rate, b2=0.99, eps=1e-3),
        "yogi": lambda: optax.yogi(learning_rate, b2=0.99, eps=1e-3),
        "adagrad": lambda: optax.adagrad(learning_rate, eps=1e-3),
    }
    return table[name]()


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
