"""The convolution that stays fast in loops against XLA's own; the others by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedmoe_jax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    block_conv,
    canonical_conv,
    canonical_product,
    conv,
    dropout,
    group_norm,
    max_pool,
    native_conv,
    normalise_groups,
    random_bytes,
    space_to_depth,
    strided_conv,
)

pytestmark = pytest.mark.slow

STEPS = 3
CANONICAL = "dim_labels=b01f_01io->b01f"


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def slow_conv(x, kernel, padding, stride):
    """Zero-padded correlation, one window at a time, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), padding, padding, (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((n - size) // stride + 1 for n in padded.shape[1:3])
    out = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            window = padded[:, top : top + size, left : left + size]
            out[:, i, j] = np.einsum("bhwi,hwio->bo", window, kernel)
    return out


# (ours, XLA's, kernel size, padding, stride): all that `canonical_conv` can do here.
FORMS = [
    (
        functools.partial(canonical_conv, padding=(padding, padding)),
        functools.partial(native_conv, padding=(padding, padding), stride=1),
        size,
        (padding, padding),
        1,
    )
    for size, padding in [(1, 0), (1, 2), (3, 0), (3, 1), (3, 2), (5, 0), (5, 2)]
]
FORMS += [
    (
        strided_conv,
        functools.partial(native_conv, padding=(0, 1), stride=2),
        3,
        (0, 1),
        2,
    )
]
NAMES = [f"{size}x{size} pad {pad} stride {step}" for _, _, size, pad, step in FORMS]
every_form = pytest.mark.parametrize(
    ("ours", "native", "size", "padding", "stride"), FORMS, ids=NAMES
)


@functools.partial(jax.jit, static_argnums=0)
def pull_back(function, x, kernel, grad):
    """The output and both gradients."""
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(grad)


some_forms = pytest.mark.parametrize(
    "form", [FORMS[3], FORMS[-1]], ids=["stride 1", "stride 2"]
)


def assert_close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def assert_pulls_back_as_native(form, shape, dtype=jnp.float32, tolerance=1e-5):
    ours, native, size, padding, stride = form
    batch, height, width, inputs, outputs = shape
    x = draw(batch, height, width, inputs, dtype=dtype)
    kernel = draw(size, size, inputs, outputs, seed=1, dtype=dtype)
    expected = slow_conv(x, kernel, padding, stride)
    grad = draw(*expected.shape, seed=2, dtype=dtype)
    out = pull_back(ours, x, kernel, grad)
    assert_close(out, pull_back(native, x, kernel, grad), tolerance)
    assert_close(out[:1], [jnp.asarray(expected, dtype)], tolerance)


@pytest.mark.parametrize("shape", [(4, 6, 8, 2, 5), (1, 8, 6, 3, 1)])
@every_form
def test_values_and_gradients_equal_native(ours, native, size, padding, stride, shape):
    assert_pulls_back_as_native((ours, native, size, padding, stride), shape)


@some_forms
def test_values_and_gradients_in_bfloat16_equal_native(form):
    assert_pulls_back_as_native(form, (4, 6, 8, 2, 5), jnp.bfloat16, 2e-2)


@pytest.mark.parametrize(
    ("size", "shape"), [(3, (2, 8, 6, 3, 4)), (5, (3, 6, 8, 1, 2))]
)
def test_block_conv_has_the_pixels_of_each_block(size, shape):
    def ours(x, kernel):
        blocks = block_conv(x, kernel)
        batch, height, width, _, outputs = blocks.shape
        blocks = blocks.reshape(batch, height, width, 2, 2, outputs)
        pixels = blocks.transpose(0, 1, 3, 2, 4, 5)
        return pixels.reshape(batch, 2 * height, 2 * width, outputs)

    native = functools.partial(native_conv, padding=(0, 0), stride=1)
    assert_pulls_back_as_native((ours, native, size, (0, 0), 1), shape)


def test_strided_conv_is_same_padding_of_even_sides():
    x, kernel = draw(2, 6, 8, 3), draw(3, 3, 3, 4, seed=1)
    same = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(strided_conv(x, kernel), same, rtol=1e-5, atol=1e-5)


def train(function, kernel, images):
    """Three gradient steps on a two-layer net inside scan: kernels and losses."""

    def step(kernel, x):
        def loss(kernel):
            return jnp.square(function(jnp.tanh(function(x, kernel)), kernel)).mean()

        value, grad = jax.value_and_grad(loss)(kernel)
        return kernel - grad, value

    return jax.lax.scan(step, kernel, images)


@functools.cache
def training(size, dtype, side=12):
    """Arguments of `train` with [T, B, H, W, F] images."""
    kernel = draw(size, size, 4, 4, seed=1, dtype=dtype) / (2 * size)
    return kernel, draw(STEPS, 5, side, side, 4, dtype=dtype)


@functools.cache
def compiled(function, size, dtype=jnp.float32, side=12):
    run = jax.jit(train, static_argnums=0)
    return run.lower(function, *training(size, dtype, side)).compile()


def assert_trains_as_native(form, dtype, tolerance, side=12):
    ours, native, size, *_ = form
    kernel, images = training(size, dtype, side)
    found = compiled(ours, size, dtype, side)(kernel, images)
    expected = jax.jit(train, static_argnums=0)(native, kernel, images)
    assert_close(found, expected, tolerance)
    moved = jnp.abs(found[0] - kernel).max() / jnp.abs(kernel).max()
    assert moved > 3 * tolerance  # nothing is equal because nothing moved


@every_form
def test_training_inside_scan_equals_native(ours, native, size, padding, stride):
    form = ours, native, size, padding, stride
    assert_trains_as_native(form, jnp.float32, 1e-5)


@some_forms
def test_training_in_bfloat16_inside_scan_equals_native(form):
    assert_trains_as_native(form, jnp.bfloat16, 3e-2)


def convolutions(program):
    return [line for line in program.as_text().splitlines() if "convolution(" in line]


def assert_canonical(lines):
    for line in lines:
        assert CANONICAL in line
        assert "lhs_dilate" not in line and "rhs_reversal" not in line


@every_form
def test_every_convolution_of_a_scan_is_canonical(ours, native, size, padding, stride):
    lines = convolutions(compiled(ours, size))
    # Two forward, two weight and one input gradient; XLA makes products of some 1x1.
    assert len(lines) >= (5 if size > 1 else 2)
    assert_canonical(lines)


@pytest.mark.parametrize(("form", "side"), [(FORMS[3], 2), (FORMS[6], 3)])
def test_kernels_larger_than_the_images_stay_canonical(form, side):
    assert_trains_as_native(form, jnp.float32, 1e-5, side)
    lines = convolutions(compiled(form[0], form[2], side=side))
    assert len(lines) >= 5
    assert_canonical(lines)


def test_native_gradients_would_not_be_canonical():
    with pytest.raises(AssertionError):
        assert_canonical(convolutions(compiled(FORMS[-1][1], 3)))


@some_forms
def test_under_vmap_over_kernels_equals_one_by_one(form):
    ours, _, size, padding, stride = form
    x, kernels = draw(3, 4, 6, 6, 2), draw(3, size, size, 2, 5, seed=1)
    grad = draw(3, 4, 6 // stride, 6 // stride, 5, seed=2)
    one = lambda *arguments: pull_back(ours, *arguments)
    together = jax.jit(jax.vmap(one))(x, kernels, grad)
    for client in range(3):
        alone = one(x[client], kernels[client], grad[client])
        assert_close([leaf[client] for leaf in together], alone, 1e-5)


CONVS = [("SAME", 1, (1, 1)), ("VALID", 1, (0, 0)), ("SAME", 2, (0, 1))]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("padding", "stride", "sides"), CONVS)
def test_conv_is_canonical_on_cpu_and_a_product_elsewhere(
    padding, stride, sides, platform
):
    x, kernel = draw(2, 4, 6, 3), draw(3, 3, 3, 5, seed=1)
    run = functools.partial(conv, padding=padding, stride=stride, platform=platform)
    names = [e.primitive.name for e in jax.make_jaxpr(run)(x, kernel).eqns]
    assert names[-1] == ("custom_vjp_call" if platform == "cpu" else "dot_general")
    assert "conv_general_dilated" not in names
    expected = slow_conv(x, kernel, sides, stride)
    np.testing.assert_allclose(run(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize(("padding", "stride", "sides"), CONVS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_conv_module_has_one_kernel_and_perhaps_a_bias(
    padding, stride, sides, use_bias
):
    module = Conv(5, "cpu", padding=padding, stride=stride, use_bias=use_bias)
    x, params = draw(2, 4, 6, 3), {"kernel": draw(3, 3, 3, 5, seed=1)}
    if use_bias:
        params["bias"] = draw(5, seed=2)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, variables) == {"params": shapes}
    out = jax.jit(module.apply)({"params": params}, x)
    expected = slow_conv(x, params["kernel"], sides, stride)
    if use_bias:
        expected += np.asarray(params["bias"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


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


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (16, 2), (28, 2), (64, 8)])
def test_group_norm_is_flax_s_with_its_gradients(channels, groups):
    x, weight = 3 + 2 * draw(2, 4, 6, channels), draw(2, 4, 6, channels, seed=1)
    params = {"scale": draw(channels, seed=2), "bias": draw(channels, seed=3)}

    def loss(module, params, x):
        out = module.apply({"params": params}, x)
        return (out * weight).sum(), out

    def run(module):
        grad = jax.grad(functools.partial(loss, module), (0, 1), has_aux=True)
        return jax.jit(grad)(params, x)

    found, expected = run(GroupNorm(groups)), run(nn.GroupNorm(num_groups=groups))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, found, expected)


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


# ---- dropout


def test_random_bytes_are_uniform():
    values = np.asarray(random_bytes(jax.random.key(0), (200, 1, 513)))
    assert values.dtype == np.uint8 and values.shape == (200, 1, 513)
    counts = np.bincount(values.ravel(), minlength=256)
    expected = values.size / 256  # about 400
    # chi-squared of 255 degrees of freedom: mean 255, deviation 23
    assert 150 < ((counts - expected) ** 2 / expected).sum() < 360
    bits = np.unpackbits(values.reshape(-1, 1), axis=1) - 0.5
    correlation = bits[:-1].T @ bits[1:] / len(bits) * 4  # of neighbouring bytes
    assert np.abs(correlation).max() < 5 / np.sqrt(len(bits))


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 1), (5, 7)])
def test_random_bytes_of_any_shape(shape):
    values = random_bytes(jax.random.key(1), shape)
    assert values.shape == shape and values.dtype == jnp.uint8
    again, other = (random_bytes(jax.random.key(i), shape) for i in (1, 2))
    np.testing.assert_array_equal(values, again)
    assert values.size < 4 or np.any(np.asarray(values) != np.asarray(other))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(rate):
    x = 1 + jnp.arange(4.0)[None] * jnp.ones((50_000, 1))
    out = np.asarray(jax.jit(dropout, static_argnums=1)(x, rate, jax.random.key(0)))
    share = (out != 0).mean(0)
    exact = 1 - round(256 * rate) / 256
    deviation = np.sqrt(exact * (1 - exact) / len(x))
    np.testing.assert_allclose(share, exact, atol=4 * deviation)
    kept = np.where(out != 0, out, np.asarray(x) / exact)
    np.testing.assert_allclose(kept, np.asarray(x) / exact, rtol=1e-6)
    np.testing.assert_allclose(out.mean(0), x[0], rtol=4 * deviation / exact)


def test_dropout_of_nothing_is_the_identity():
    x = draw(3, 4)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_gradients_pass_what_was_kept():
    x, key = 1 + jnp.abs(draw(8, 8)), jax.random.key(3)
    out, grad = dropout(x, 0.5, key), jax.grad(lambda x: dropout(x, 0.5, key).sum())(x)
    np.testing.assert_array_equal(grad, 2.0 * (np.asarray(out) != 0))


def test_dropout_near_one_keeps_a_little():
    kept = dropout(jnp.ones(100_000), 0.999, jax.random.key(0))
    assert set(np.unique(kept)) == {0.0, 256.0}
    np.testing.assert_allclose(kept.mean(), 1, atol=0.2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pooling_shares_the_gradient_among_equal_maxima(dtype):
    """As `jnp.max` does, in a loop; whole numbers make ties of two, three and four."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 3, (4, 2, 6, 8, 5)), dtype)
    weight = jnp.asarray(rng.integers(1, 9, (4, 2, 3, 4, 5)), dtype)

    def gradients(pooled):
        one = jax.grad(lambda x, weight: (pooled(x) * weight).sum())
        step = lambda _, rows: (None, one(*rows))
        return jax.jit(lambda: jax.lax.scan(step, None, (x, weight))[1])()

    blocks = lambda x: x.reshape(2, 3, 2, 4, 2, 5).max((2, 4))
    found, expected = gradients(max_pool), gradients(blocks)
    tied = {float(share) for share in np.unique(np.float32(found / weight.max()))}
    assert len(tied) > 3
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0.01)


def test_the_gradient_of_pooled_images_is_finite_where_they_are_computed_anew():
    """Without XLA's optimisation, as tests have it, both rounded in their own way."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, weight = (draw(32, 16, 16, 32), draw(32), draw(32)), draw(32, 8, 8, 32)

    def loss(images, scale, bias):
        pooled = max_pool(normalise_groups(images, scale, bias, 4))
        return (nn.relu(pooled) * weight).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    for found, expected in zip(
        jax.jit(gradient)(*params), gradient(*params), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(10, 33, 7), (1, 4, 1)])
def test_canonical_product_is_the_product_in_values_and_gradients(
    dtype, batch, inputs, outputs
):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(3, *shape)), dtype)
    arrays = draw(batch, inputs), draw(inputs, outputs), draw(batch, outputs)

    def run(product):
        def one(x, kernel, weight):
            loss = lambda x, kernel: (product(x, kernel) * weight).sum()
            return product(x, kernel), jax.grad(loss, (0, 1))(x, kernel)

        step = lambda _, rows: (None, one(*rows))
        scanned = jax.jit(lambda: jax.lax.scan(step, None, arrays)[1])()
        return scanned, jax.jit(jax.vmap(one))(*arrays)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.02}
    close = lambda a, b: np.testing.assert_allclose(
        np.float32(a), np.float32(b), **tolerance
    )
    jax.tree.map(close, run(canonical_product), run(jnp.matmul))


def test_dense_has_the_parameters_of_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    ours, theirs = Dense(5, "cpu"), nn.Dense(5)
    params = theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), params)
    np.testing.assert_allclose(
        ours.apply(params, x), theirs.apply(params, x), rtol=1e-6
    )
