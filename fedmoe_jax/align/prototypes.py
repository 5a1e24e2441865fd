"""Groups of clients, found from the mean features of their examples.

k-means over clients with class-conditional means. A client's distance from a group is

    d(c, g) = sum_y w_cy |m_cy - mu_gy|^2,   w_cy = n_cy / sum_y n_cy,

over labels y, with m_cy the mean feature of its n_cy examples of label y and mu_gy the
mean of the group's clients, shrunken towards that of all clients,

    mu_gy = (sum_{c in g} n_cy m_cy + kappa m_y) / (sum_{c in g} n_cy + kappa).

Labels that two clients do not share say nothing about them, so that label skew alone
makes no groups. Where examples have no labels there is one class.

The number of groups k is the one whose dispersion falls furthest below that of shuffled
clients (the gap statistic of Tibshirani, Walther and Hastie, 2001, with a permutation
in the place of their uniform reference): in each label the means are dealt out anew
among the clients that have it, or, where there is one class, each principal component
among all clients. Two groups of one class differ in one component alone, which is as
much in two when it is dealt out; against two groups clients are rotated instead, as in
rotation tests (Langsrud, 2005), which keeps the covariance. There are no groups unless
the gap is larger than those of nearly all shuffled sets themselves (a permutation test
at `LEVEL`), and than `WORTH`: label skew alone makes small ones, as a mean of few
examples says little.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array

RESTARTS = 20
SHUFFLES = 39
LEVEL = 0.05  # probability with which clients without groups seem to have some
WORTH = 0.25  # gap below which groups explain too little to part clients for
STEPS = 30  # of Lloyd's algorithm, at most
SMALL = 1e-9


class Means(NamedTuple):
    """The messages of n clients.

    Attributes:
      feature: [n, L, D] float32, mean feature of each label; any value where the client
        has no example of it.
      count: [n, L] float32 >= 0, examples.
    """

    feature: Array
    count: Array


class Groups(NamedTuple):
    """Groups that clients fall into.

    Attributes:
      distance: [n, most] float32 >= 0, of each client from each group, infinite from
        the k-th on.
      dispersion: [] float32 >= 0, mean distance of clients from their own groups, as a
        share of that from the mean of all.
    """

    distance: Array
    dispersion: Array


def weigh_labels(count: Array) -> Array:
    """The share of each label among a client's examples, [n, L]."""
    return count / jnp.maximum(count.sum(axis=1, keepdims=True), SMALL)


def average_labels(means: Means) -> Array:
    """The mean [L, D] of all clients' examples of each label; 0 for none."""
    total = jnp.einsum("cl,cld->ld", means.count, means.feature)
    return total / jnp.maximum(means.count.sum(axis=0), SMALL)[:, None]


def center(means: Means, mean: Array | None = None) -> Means:
    """Features less the `mean` [L, D] of each label, their own if it is not given.

    They are 0 where a client has no example of the label.
    """
    mean = average_labels(means) if mean is None else mean
    known = means.count[:, :, None] > 0
    return means._replace(feature=jnp.where(known, means.feature - mean[None], 0.0))


def average_groups(means: Means, member: Array, shrink: Array) -> Array:
    """Shrunken means mu [k, L, D] of groups.

    Args:
      means: centered, so that they shrink towards 0.
      member: [n, k] float32, 1 where the client belongs to the group, else 0.
      shrink: [] float32 >= 0, kappa, in examples.
    """
    count = jnp.einsum("ck,cl->kl", member, means.count)
    total = jnp.einsum("ck,cl,cld->kld", member, means.count, means.feature)
    return total / jnp.maximum(count + shrink, SMALL)[:, :, None]


def measure_distance(means: Means, mu: Array) -> Array:
    """d(c, g) [n, k] of clients from groups with the means `mu` [k, L, D]."""
    share = weigh_labels(means.count)
    own = jnp.einsum("cl,cld->c", share, jnp.square(means.feature))
    group = jnp.einsum("cl,kld->ck", share, jnp.square(mu))
    both = jnp.einsum("cl,cld,kld->ck", share, means.feature, mu)
    return jnp.maximum(own[:, None] + group - 2 * both, 0.0)


def choose_seeds(key: Array, means: Means, shrink: Array, most: int) -> Array:
    """Means mu [most, L, D] to start from: of one client each, far from one another.

    As k-means++ (Arthur and Vassilvitskii, 2007): the next is drawn with a probability
    in proportion to its distance from the nearest so far; the first one evenly.
    """
    num_clients = len(means.count)

    def add(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        mu, nearest = carry
        draw = jax.random.fold_in(key, number)
        odds = jnp.where(jnp.isinf(nearest), 1.0, nearest)
        client = jax.random.categorical(draw, jnp.log(odds + SMALL))
        member = jax.nn.one_hot(client[None], num_clients).T
        own = average_groups(means, member, shrink)
        nearest = jnp.minimum(nearest, measure_distance(means, own)[:, 0])
        return mu.at[number].set(own[0]), nearest

    mu = jnp.zeros((most, *means.feature.shape[1:]))
    far = jnp.full(num_clients, jnp.inf)
    return jax.lax.fori_loop(0, most, add, (mu, far))[0]


def run_lloyd(means: Means, mu: Array, shrink: Array, num_groups: Array) -> Array:
    """Distances [n, most] after Lloyd's algorithm from the means `mu` [most, L, D].

    Those of groups from `num_groups` [] on are infinite.
    """
    there = jnp.arange(len(mu)) < num_groups

    def measure(mu: Array) -> Array:
        return jnp.where(there[None], measure_distance(means, mu), jnp.inf)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        step, distance, before = carry
        moved = distance.argmin(axis=1) != before.argmin(axis=1)
        return (step == 0) | ((step < STEPS) & moved.any())

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, distance, _ = carry
        member = jax.nn.one_hot(distance.argmin(axis=1), len(mu))
        return number + 1, measure(average_groups(means, member, shrink)), distance

    start = measure(mu)
    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), start, start))[1]


def cluster(
    key: Array, means: Means, shrink: Array, num_groups: Array, most: int
) -> Groups:
    """k-means over clients, the best of several starts.

    Args:
      key: a JAX key, consumed.
      means: centered.
      shrink: [] float32 >= 0, kappa.
      num_groups: [] int32, k, at most `most`.
      most: static, so that all k share one program.
    """

    def start(key: Array) -> Array:
        mu = choose_seeds(key, means, shrink, most)
        return run_lloyd(means, mu, shrink, num_groups)

    distances = jax.lax.map(start, jax.random.split(key, RESTARTS))
    spread = distances.min(axis=2).mean(axis=1)
    best = spread.argmin()
    whole = measure_distance(means, jnp.zeros((1, *means.feature.shape[1:])))
    return Groups(distances[best], spread[best] / jnp.maximum(whole.mean(), SMALL))


def shuffle_holders(key: Array, means: Means) -> Means:
    """Means of each label dealt out anew among the clients that have it."""

    def deal(key: Array, feature: Array, count: Array) -> tuple[Array, Array]:
        lots = jax.random.uniform(key, count.shape)
        holders = jnp.argsort(jnp.where(count > 0, 0, 1), stable=True)
        drawn = jnp.argsort(jnp.where(count > 0, lots, 2.0))
        move = lambda leaf: leaf.at[holders].set(leaf[drawn])
        return move(feature), move(count)

    keys = jax.random.split(key, means.count.shape[1])
    return Means(*jax.vmap(deal, (0, 1, 1), 1)(keys, *means))


def shuffle_components(key: Array, means: Means) -> Means:
    """Each principal component of the features of ONE class dealt out anew."""
    feature = means.feature[:, 0]
    _, _, axes = jnp.linalg.svd(feature, full_matrices=False)
    dealt = jax.random.permutation(key, feature @ axes.T, axis=0, independent=True)
    return means._replace(feature=(dealt @ axes)[:, None])


def rotate_clients(key: Array, means: Means) -> Means:
    """Features of ONE class as if each client's were drawn anew, normal, around 0.

    An orthogonal mixture of clients, drawn evenly from those that leave a mean of 0 at
    0: what is left of any groups is the covariance of the features.

    Args:
      key: a JAX key, consumed.
      means: of n clients, whose mean is taken away.
    """
    feature = means.feature[:, 0] - means.feature[:, 0].mean(axis=0, keepdims=True)
    num_clients = len(feature)
    drawn = jax.random.normal(key, (2, num_clients, num_clients - 1))
    # Orthonormal bases of what is orthogonal to the vector of ones, both at random.
    basis = jnp.linalg.qr(drawn - drawn.mean(axis=1, keepdims=True))[0]
    return means._replace(feature=(basis[0] @ (basis[1].T @ feature))[:, None])


def shuffle(key: Array, means: Means) -> tuple[Means, Means]:
    """Centered means of clients without groups, but of the same spread.

    Returns:
      Those to compare with two groups, and with more.
    """
    if means.count.shape[1] > 1:
        dealt = center(shuffle_holders(key, means))
        return dealt, dealt
    rotated, dealt = rotate_clients(key, means), shuffle_components(key, means)
    return center(rotated), center(dealt)


def count_search_bytes(num_clients: int, shape: tuple[int, int], most: int) -> float:
    """Bytes that `find_groups` holds at once, as it is compiled.

    That are seven times the messages (as sent, centered, dealt out anew, and what
    products of them need) and distances of all starts; where there is one class also
    matrices of clients by clients, for rotations.

    Args:
      num_clients: n.
      shape: L and D of the messages.
      most: groups that there can be.
    """
    labels, width = shape
    numbers = 7 * num_clients * labels * (width + 1)
    numbers += (RESTARTS + most) * num_clients * most
    if labels == 1:
        numbers += 14 * num_clients**2
    return 4.0 * numbers


class Found(NamedTuple):
    """The groups that there are.

    Attributes:
      count: [] int32, k >= 1; 1 where there are none.
      distance: [n, most] float32, of each client from each group, infinite from the
        k-th on; 0 from the first where there are none.
      gap: [] float32, by how much the log-dispersion of k groups lies below that of
        shuffled clients.
      chance: [] float32 in (0, 1], share of sets, this one and the shuffled ones, whose
        largest gap is as large.
    """

    count: Array
    distance: Array
    gap: Array
    chance: Array


def find_groups(key: Array, means: Means, shrink: Array, *, most: int) -> Found:
    """Finds how many groups there are, and each client's distance from each.

    Args:
      key: a JAX key, consumed.
      means: of all clients.
      shrink: [] float32 >= 0, kappa.
      most: groups that there can be, >= 1.
    """
    num_clients = means.count.shape[0]
    chex.assert_shape(means.feature, (*means.count.shape, None))
    means, one = center(means), jnp.ones(())
    none = jnp.full((num_clients, most), jnp.inf).at[:, 0].set(0.0)
    if min(most, num_clients) == 1:
        return Found(jnp.int32(1), none, jnp.zeros(()), one)
    numbers = jnp.arange(2, min(most, num_clients) + 1)

    def try_numbers(key: Array, two: Means, more: Means) -> Groups:
        def attempt(k: Array) -> Groups:
            own = jax.tree.map(lambda a, b: jnp.where(k == 2, a, b), two, more)
            return cluster(key, own, shrink, k, most)

        return jax.lax.map(attempt, numbers)

    def disperse_shuffled(key: Array) -> Array:
        deal, own = jax.random.split(key)
        return try_numbers(own, *shuffle(deal, means)).dispersion

    own_key, shuffle_key = jax.random.split(key)
    own = try_numbers(own_key, means, means)
    shuffled = jax.lax.map(disperse_shuffled, jax.random.split(shuffle_key, SHUFFLES))
    log_all = jnp.log(jnp.vstack([own.dispersion, shuffled]) + SMALL)
    gaps = log_all[1:].mean(axis=0)[None] - log_all  # [1 + SHUFFLES, numbers]
    largest, best = gaps.max(axis=1), gaps[0].argmax()
    chance = (largest >= largest[0]).mean()
    exist = (chance <= LEVEL) & (largest[0] >= WORTH)
    return Found(
        count=jnp.where(exist, numbers[best], 1).astype(jnp.int32),
        distance=jnp.where(exist, own.distance[best], none),
        gap=largest[0],
        chance=chance,
    )
