"""The models of the works in plain JAX, shared by the JAX peers' runners."""

import jax
import jax.numpy as jnp
import meter
from meter import works


def _dense(key, inputs: int, outputs: int) -> dict:
    bound = (6 / (inputs + outputs)) ** 0.5
    w = jax.random.uniform(key, (inputs, outputs), minval=-bound, maxval=bound)
    return {"w": w, "b": jnp.zeros(outputs)}


def _conv(key, inputs: int, outputs: int) -> dict:
    bound = (6 / (9 * (inputs + outputs))) ** 0.5
    shape = (3, 3, inputs, outputs)
    w = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return {"w": w, "b": jnp.zeros(outputs)}


def init(name: str, key) -> dict:
    """Parameters, uniform as in Glorot and Bengio; the CNN is pfl's `simple_cnn`."""
    keys = jax.random.split(key, 4)
    if name == "mlp":
        hidden = _dense(keys[0], 3072, works.HIDDEN)
        return {"0": hidden, "1": _dense(keys[1], works.HIDDEN, works.CLASSES)}
    first, second = works.CHANNELS
    return {
        "0": _conv(keys[0], works.IMAGE[2], first),
        "1": _conv(keys[1], first, second),
        "2": _dense(keys[2], works.flattened_size(), works.DENSE),
        "3": _dense(keys[3], works.DENSE, works.CLASSES),
    }


def native_convolution(x, w):
    """XLA's own convolution; fast outside loops, naive in them on CPU (jax #12868)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=numbers
    )


def matmul_convolution(x, w):
    """im2col: nine shifted slices side by side, then one matrix product."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    slices = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(slices, -1) @ w.reshape(-1, w.shape[-1])


def _drop(x, key, rate: float):
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _cnn_features(params, x, keys, convolution):
    """[B, 32, 32, 3] to [B, 128]."""
    for layer in ("0", "1"):
        x = jax.nn.relu(convolution(x, params[layer]["w"]) + params[layer]["b"])
    b, h, w, f = x.shape
    # Faster here than `reduce_window`, whose gradient is a scatter.
    x = x.reshape(b, h // 2, 2, w // 2, 2, f).max((2, 4))
    x = _drop(x, keys[0], works.DROPOUT[0]).reshape(b, -1)
    x = jax.nn.relu(x @ params["2"]["w"] + params["2"]["b"])
    return _drop(x, keys[1], works.DROPOUT[1])


def loss(params, images, labels, key, convolution):
    """Mean cross-entropy; `key` = None leaves dropout out."""
    if len(params) == 2:
        x = images.reshape(len(images), -1)
        x = jax.nn.relu(x @ params["0"]["w"] + params["0"]["b"])
        last = params["1"]
    else:
        keys = (None, None) if key is None else jax.random.split(key)
        x = _cnn_features(params, images, keys, convolution)
        last = params["3"]
    logits = jax.nn.log_softmax(x @ last["w"] + last["b"])
    return -jnp.take_along_axis(logits, labels[:, None], 1).mean()


def finish(before, after, images, labels) -> None:
    """Reports the loss of two sets of parameters on the checked images, and memory."""
    images, labels = images[: works.CHECKED], labels[: works.CHECKED]
    evaluate = jax.jit(
        lambda params: loss(params, images, labels, None, native_convolution)
    )
    meter.finish(evaluate(before), evaluate(after))
