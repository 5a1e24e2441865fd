"""Populations larger than the data: every client draws its examples among all of them.

So examples have several owners, and clients are no independent samples of the world.
"""

import numpy as np

KINDS = ("dirichlet", "classes", "quantity", "iid")


def draw_examples(
    stratum: np.ndarray, size: np.ndarray, mix: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws each client's examples with replacement, and drops what it drew twice.

    Args:
      stratum: [X] int in [0, L).
      size: [N] int, draws of each client.
      mix: [N, L] float, its strata, rows sum to 1; 0 for strata without examples.
      rng: NumPy generator, advanced.

    Returns:
      Owner and id of each example, [Q] each, client by client.
    """
    counts = rng.multinomial(size, mix)  # [N, L]
    clients, strata = np.indices(counts.shape).reshape(2, -1)
    client, label = (np.repeat(each, counts.ravel()) for each in (clients, strata))
    members = np.argsort(stratum, kind="stable")
    number = np.bincount(stratum, minlength=mix.shape[1])
    start = np.cumsum(number) - number
    place = start[label] + (rng.random(len(label)) * number[label]).astype(np.int64)
    pairs = np.unique(client * len(stratum) + members[place])
    return np.divmod(pairs, len(stratum))


def draw_sizes(
    kind: str, num_clients: int, count: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws [N] of each client, `count` on average: equal ones, but for `quantity`.

    Of `quantity` they are in Dirichlet(alpha) proportions, at least one for each.
    """
    if kind != "quantity":
        return np.full(num_clients, count)
    shares = rng.dirichlet(np.full(num_clients, alpha))
    return 1 + rng.multinomial(num_clients * (count - 1), shares)


def draw_mix(
    kind: str,
    held: np.ndarray,
    share: np.ndarray,
    alpha: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The strata [N, L] from which each client draws, rows sum to 1.

    Args:
      kind: in `KINDS`. Of `dirichlet` every client's mix is drawn from
        Dirichlet(alpha); of `classes` its classes have equal shares; of the others all
        clients have the mix of the data.
      held: [N, L] bool, the classes of each client, of `classes`.
      share: [L] float, of the data.
      alpha: > 0.
      rng: NumPy generator, advanced.
    """
    present = share > 0
    if kind == "dirichlet":
        mix = np.zeros(held.shape)
        drawn = rng.dirichlet(np.full(present.sum(), alpha), len(held))
        # Very small alphas leave rows of zeros, which are one class in the limit.
        none = ~(drawn.sum(axis=1) > 0)
        drawn[none] = np.eye(present.sum())[
            rng.integers(present.sum(), size=none.sum())
        ]
        mix[:, present] = drawn
    elif kind == "classes":
        mix = (held & present).astype(float)
    else:
        mix = np.broadcast_to(share, held.shape)
    return mix / mix.sum(axis=1, keepdims=True)
