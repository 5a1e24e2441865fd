"""The Gaussian noise on sums of updates, see `privacy.updates`."""

import jax
import optax

from fedmoe_jax.types import Array, Hyper, Keys, PyTree

SUMS = 1603  # purpose, folded into the key of a round


def draw_noise(tree: PyTree, deviation: Array, key: Array) -> PyTree:
    """Gaussian noise of the shapes of a pytree.

    Args:
      tree: float32 arrays.
      deviation: [] float32, standard deviation of each number.
      key: a JAX key, consumed.
    """
    noise = optax.tree.random_like(key, tree, sampler=jax.random.normal)
    return optax.tree.scale(deviation, noise)


def hide_sums(total: PyTree, hyper: Hyper, keys: Keys) -> PyTree:
    """Sums of deltas with noise, the same on all devices that have the sums.

    Those of parts that no client has trained get some, too, and are not read.

    Args:
      total: like params, over all clients and devices, late updates among them.
      hyper: gives `privacy.clip` and `privacy.noise`.
      keys: of the round.
    """
    deviation = hyper.privacy.noise * hyper.privacy.clip
    return optax.tree.add(total, draw_noise(total, deviation, keys.of(SUMS)))
