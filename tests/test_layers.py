"""The convolution that stays fast in loops against XLA's own; reshapes by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedmoe_jax.layers import (
    Conv,
    canonical_conv,
    conv,
    group_norm,
    max_pool,
    native_conv,
    space_to_depth,
)

STEPS = 3
CANONICAL = "dim_labels=b01f_01io->b01f"


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slow_conv(x, kernel):
    """Zero-padded correlation, one window at a time, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    height, width = kernel.shape[:2]
    rows, columns = height // 2, width // 2
    padded = np.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[3]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            window = padded[:, i : i + height, j : j + width]
            out[:, i, j] = np.einsum("bhwi,hwio->bo", window, kernel)
    return out


def pull_back(function, x, kernel, grad):
    """The output and both gradients."""
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(grad)


def train(function, kernel, images):
    """Three gradient steps on a two-layer net inside scan: kernels and losses."""

    def step(kernel, x):
        def loss(kernel):
            return jnp.square(function(jnp.tanh(function(x, kernel)), kernel)).mean()

        value, grad = jax.value_and_grad(loss)(kernel)
        return kernel - 0.1 * grad, value

    return jax.lax.scan(step, kernel, images)


@pytest.mark.parametrize(
    ("height", "width", "inputs", "outputs"),
    [(3, 3, 2, 5), (1, 1, 3, 2), (5, 3, 1, 4)],
)
def test_canonical_conv_equals_native(height, width, inputs, outputs):
    x = draw(4, 6, 7, inputs)
    kernel = draw(height, width, inputs, outputs, seed=1)
    grad = draw(4, 6, 7, outputs, seed=2)
    native = jax.jit(pull_back, static_argnums=0)(native_conv, x, kernel, grad)
    canonical = jax.jit(pull_back, static_argnums=0)(canonical_conv, x, kernel, grad)
    np.testing.assert_allclose(canonical[0], slow_conv(x, kernel), atol=1e-5)
    for ours, theirs in zip(canonical, native, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def training():
    """Arguments of `train` with [T, B, H, W, F] images."""
    return draw(3, 3, 4, 4, seed=1) / 6, draw(STEPS, 5, 8, 8, 4)


@pytest.fixture(scope="module")
def compiled(training):
    return jax.jit(train, static_argnums=0).lower(canonical_conv, *training).compile()


def test_canonical_conv_inside_scan_equals_native(training, compiled):
    kernel, losses = compiled(*training)
    expected = jax.jit(train, static_argnums=0)(native_conv, *training)
    np.testing.assert_allclose(kernel, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    assert len(set(losses.tolist())) == STEPS  # the kernel did move


def test_every_convolution_of_a_scan_is_canonical(compiled):
    lines = [line for line in compiled.as_text().splitlines() if "convolution(" in line]
    assert len(lines) >= 5  # two forward, two weight and one input gradient
    for line in lines:
        assert CANONICAL in line
        assert "lhs_dilate" not in line and "rhs_reversal" not in line


def test_canonical_conv_under_vmap_over_kernels_equals_one_by_one():
    x, grad = draw(3, 4, 6, 6, 2), draw(3, 4, 6, 6, 5, seed=2)
    kernels = draw(3, 3, 3, 2, 5, seed=1)

    def one(x, kernel, grad):
        return pull_back(canonical_conv, x, kernel, grad)

    together = jax.jit(jax.vmap(one))(x, kernels, grad)
    single = jax.jit(one)
    for client in range(3):
        alone = single(x[client], kernels[client], grad[client])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[client], theirs, rtol=1e-5, atol=1e-5)


def test_conv_is_the_canonical_one_on_cpu():
    x, kernel = draw(1, 4, 4, 1), draw(3, 3, 1, 1)
    names = [e.primitive.name for e in jax.make_jaxpr(conv)(x, kernel).eqns]
    assert names == ["custom_vjp_call"]


def test_conv_module_has_one_kernel_and_no_bias():
    module, x, kernel = Conv(features=5), draw(2, 4, 6, 3), draw(3, 3, 3, 5, seed=1)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": kernel.shape}}
    out = jax.jit(module.apply)({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(out, slow_conv(x, kernel), atol=1e-5)


def test_space_to_depth_by_hand():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    out = np.asarray(space_to_depth(jnp.asarray(x)))
    assert out.shape == (2, 2, 3, 12)
    for i in range(2):
        for j in range(3):
            block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]  # rows, columns, F
            np.testing.assert_array_equal(out[:, i, j], block.reshape(2, 12))


def test_max_pool_by_hand():
    x = np.random.default_rng(0).permutation(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    out = np.asarray(max_pool(jnp.asarray(x)))
    assert out.shape == (2, 2, 3, 3)
    for i in range(2):
        for j in range(3):
            block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(out[:, i, j], block.max(axis=(1, 2)))


class Normalise(nn.Module):
    @nn.compact
    def __call__(self, x):
        return group_norm(x, "norm")


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (16, 2), (28, 2)])
def test_group_norm_normalises_groups_of_about_eight(channels, groups):
    x = 3 + 2 * draw(2, 4, 4, channels)
    out, variables = jax.jit(Normalise().init_with_output)(jax.random.key(0), x)
    assert variables["params"]["norm"]["scale"].shape == (channels,)
    parts = np.asarray(x).reshape(2, 16, groups, channels // groups)
    mean = parts.mean(axis=(1, 3), keepdims=True)
    deviation = parts.std(axis=(1, 3), keepdims=True)
    expected = ((parts - mean) / deviation).reshape(x.shape)
    np.testing.assert_allclose(out, expected, atol=1e-4)
