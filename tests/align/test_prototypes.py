"""Groups of clients from prototypes: closed forms, a NumPy twin, planted groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.align.prototypes import (
    Means,
    average_groups,
    center,
    choose_seeds,
    count_search_bytes,
    find_groups,
    measure_distance,
    rotate_clients,
    run_lloyd,
    shuffle_components,
    shuffle_holders,
)

KEY, SHRINK = jax.random.key(0), jnp.float32(5.0)


@functools.partial(jax.jit, static_argnames="most")
def find(key, means, most):
    return find_groups(key, means, SHRINK, most=most)


def plant(groups, labels, *, apart, clients=20, alpha=100.0, width=16, seed=0, skew=1):
    """Clients of planted groups, whose means are noisy as means of examples are.

    Group g has a share of the clients in proportion to `(g + 1) ** -(skew - 1)`.
    """
    rng = np.random.default_rng(seed)
    share = np.arange(1, groups + 1) ** (1.0 - skew)
    ends = np.round(clients * share.cumsum() / share.sum())
    group = np.searchsorted(ends, np.arange(clients), side="right")
    center = rng.normal(size=(labels, width)) + apart * rng.normal(
        size=(groups, labels, width)
    )
    count = np.round(70 * rng.dirichlet([alpha] * labels, clients))
    count[count.sum(axis=1) == 0, 0] = 10
    noise = rng.normal(size=(clients, labels, width))
    feature = center[group] + noise / np.sqrt(np.maximum(count, 1))[:, :, None]
    leaves = feature.astype(np.float32), count.astype(np.float32)
    return Means(*map(jnp.asarray, leaves)), group


def draw_means(clients, labels, width, seed=0):
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 6, (clients, labels)).astype(np.float32)
    count[:, 0] += 1  # every client has an example
    feature = rng.normal(size=(clients, labels, width)).astype(np.float32)
    return Means(jnp.asarray(feature), jnp.asarray(count))


def test_center_takes_away_the_mean_of_all_examples_of_a_label():
    feature = jnp.array([[[1.0], [7.0]], [[4.0], [9.0]]])
    found = center(Means(feature, jnp.array([[2.0, 0.0], [1.0, 3.0]])))
    np.testing.assert_allclose(found.feature[:, 0, 0], [-1, 2])  # less 2
    np.testing.assert_allclose(found.feature[:, 1, 0], [0, 0])  # one holder, one none


def test_distance_and_means_by_hand():
    # Label 0 has weight 3/4 at client 0; client 1 has label 1 alone.
    feature = jnp.array([[[2.0], [0.0]], [[0.0], [3.0]]])
    means = Means(feature, jnp.array([[3.0, 1.0], [0.0, 2.0]]))
    mu = average_groups(means, jnp.array([[1.0], [1.0]]), jnp.float32(1.0))
    # (3 * 2) / (3 + 1) and (1 * 0 + 2 * 3) / (3 + 1)
    np.testing.assert_allclose(mu[0, :, 0], [1.5, 1.5])
    found = measure_distance(means, mu)
    np.testing.assert_allclose(found[:, 0], [0.75 * 0.25 + 0.25 * 2.25, 2.25])


def test_distance_equals_a_loop():
    means = draw_means(6, 3, 4)
    mu = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    expected = np.zeros((6, 2))
    for client in range(6):
        share = means.count[client] / means.count[client].sum()
        for group in range(2):
            for label in range(3):
                gap = means.feature[client, label] - mu[group, label]
                expected[client, group] += share[label] * float(gap @ gap)
    np.testing.assert_allclose(measure_distance(means, mu), expected, rtol=1e-4)


def test_lloyd_ends_where_no_client_moves():
    means = center(plant(3, 4, apart=0.4)[0])
    mu = average_groups(means, jax.nn.one_hot(jnp.arange(20) % 5, 5), SHRINK)
    distance = run_lloyd(means, mu, SHRINK, jnp.int32(3))
    assert np.isinf(distance[:, 3:]).all()
    member = jax.nn.one_hot(distance.argmin(axis=1), 5)
    again = measure_distance(means, average_groups(means, member, SHRINK))
    np.testing.assert_array_equal(again[:, :3].argmin(1), distance.argmin(1))


@pytest.mark.slow
def test_shuffle_holders_deals_a_label_among_those_that_have_it():
    means = draw_means(8, 3, 2)
    found = shuffle_holders(KEY, means)
    for label in range(3):
        held = np.asarray(means.count[:, label]) > 0
        np.testing.assert_array_equal(np.asarray(found.count[:, label]) > 0, held)
        dealt, own = (
            np.c_[m.count[held, label], m.feature[held, label]].tolist()
            for m in (found, means)
        )
        assert sorted(dealt) == sorted(own)
    assert not np.array_equal(found.feature, means.feature)


def test_shuffle_components_keeps_the_spread_of_every_component():
    means = center(draw_means(30, 1, 3))
    found = shuffle_components(KEY, means)
    axes = np.linalg.svd(means.feature[:, 0], full_matrices=False)[2]
    for dealt, own in zip(
        *(
            np.sort(np.asarray(m.feature[:, 0]) @ axes.T, axis=0).T
            for m in (found, means)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(dealt, own, atol=1e-5)


def test_rotate_clients_keeps_the_covariance_and_no_groups():
    """Of two groups far apart in one feature, which are one cloud afterwards."""
    means, group = plant(2, 1, apart=3.0, width=4)
    before = np.asarray(means.feature[:, 0])
    after = np.asarray(rotate_clients(KEY, means).feature[:, 0])
    np.testing.assert_allclose(after.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(after.T), np.cov(before.T), rtol=1e-4, atol=1e-5)
    axis = np.linalg.eigh(np.cov(before.T))[1][:, -1]

    def kurtosis(rows):
        along = (rows - rows.mean(axis=0)) @ axis
        return np.mean(along**4) / np.mean(along**2) ** 2

    assert kurtosis(before) < 1.1 < 1.5 < kurtosis(after)  # 1 of two points, 3 normal


def test_seeds_are_far_from_one_another():
    means, group = plant(8, 1, apart=1.0, clients=16)
    start = functools.partial(choose_seeds, means=center(means), shrink=SHRINK, most=8)
    mu = jax.jit(jax.vmap(start))(jax.random.split(KEY, 200))
    nearest = jax.vmap(functools.partial(measure_distance, center(means)))(mu)
    found = [len(set(group[each.argmin(axis=0)])) for each in np.asarray(nearest)]
    # Drawn evenly, 8 of 8 groups would be there in 0.2 % of the starts.
    assert np.mean(np.array(found) == 8) > 0.5


@pytest.mark.slow
def test_eight_groups_of_two_clients_are_found():
    for seed in range(3):
        means, group = plant(8, 1, apart=1.0, clients=16, seed=seed)
        found = find(jax.random.key(seed), means, most=8)
        assert int(found.count) == 8
        nearest = np.asarray(found.distance).argmin(axis=1).tolist()
        assert len(set(zip(group.tolist(), nearest, strict=True))) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "labels", "alpha"),
    [(4, 5, 100.0), (2, 5, 0.3), (4, 1, 1.0), (3, 1, 1.0), (2, 1, 1.0)],
)
def test_planted_groups_are_found_and_their_number(groups, labels, alpha):
    for seed in range(3):
        means, group = plant(groups, labels, apart=1.0, alpha=alpha, seed=seed)
        found = find(jax.random.key(seed), means, most=6)
        assert int(found.count) == groups and found.chance <= 0.05 and found.gap > 0.25
        nearest = np.asarray(found.distance).argmin(axis=1)
        # Two labels are one partition: every group has a number of its own.
        pairs = set(zip(group.tolist(), nearest.tolist(), strict=True))
        assert len(pairs) == groups == len(set(nearest.tolist()))
        assert np.isinf(found.distance[:, groups:]).all()


@pytest.mark.slow
def test_sixteen_groups_of_unequal_sizes_are_found_among_many_clients():
    """Of 120 clients the largest group has 35 and the least two."""
    means, group = plant(16, 1, apart=1.0, clients=120, skew=2)
    sizes = np.bincount(group)
    assert (len(sizes), sizes.max(), sizes.min()) == (16, 35, 2)
    found = find(KEY, means, most=16)
    assert int(found.count) == 16
    nearest = np.asarray(found.distance).argmin(axis=1)
    assert len(set(zip(group.tolist(), nearest.tolist(), strict=True))) == 16


@pytest.mark.slow
def test_groups_are_seldom_found_where_there_are_none():
    """In at most one of twenty sets, as the permutation test promises: here of 60."""
    sets = [plant(1, 1, apart=0.0, clients=12, seed=seed)[0] for seed in range(60)]
    means = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)
    look = functools.partial(find_groups, shrink=SHRINK, most=3)
    one = lambda own: look(*own)
    found = jax.jit(functools.partial(jax.lax.map, one))(
        (jax.random.split(KEY, 60), means)
    )
    assert (found.count > 1).sum() <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "alpha"), [(5, 100.0), (5, 0.1), (1, 1.0)])
def test_clients_without_groups_have_one(labels, alpha):
    for seed in range(3):
        means, _ = plant(1, labels, apart=0.0, alpha=alpha, seed=seed)
        found = find(jax.random.key(seed), means, most=6)
        assert int(found.count) == 1
        np.testing.assert_array_equal(found.distance[:, 0], 0)
        assert np.isinf(found.distance[:, 1:]).all()


def test_one_client_or_one_expert_has_no_groups():
    for means, most in ((draw_means(1, 2, 3), 4), (draw_means(5, 2, 3), 1)):
        found = find(KEY, means, most=most)
        assert int(found.count) == 1 and found.chance == 1
        assert found.distance.shape == (len(means.count), most)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(10, 64), (1, 64)])
def test_a_search_holds_about_as_much_as_is_counted(shape):
    """As compiled; other versions and platforms may need somewhat more or less."""
    clients, most = 400, 8
    rows = lambda *own: jax.ShapeDtypeStruct((clients, *own), jnp.float32)
    compiled = find.lower(KEY, Means(rows(*shape), rows(shape[0])), most).compile()
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    counted = count_search_bytes(clients, shape, most)
    assert 0.5 * needed < counted < 2 * needed
