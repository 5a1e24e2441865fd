"""Noise that each client adds to its feedback before it leaves the client.

Local differential privacy towards the server: every number of the report is brought
into [0, 1] and gets Gaussian noise of standard deviation `privacy.feedback_noise`.
These are, of each expert that the client has trained, accuracy, likelihood exp(-loss),
frequency, share of the positions and peak; of each that it has received, where clients
probe, the likelihood of the probe; and every number of the strategy's own report. What
is made of them, fitness, usage, weights of averages by routed examples, is
post-processing. The clients' mean loss and accuracy (`train_loss`) are the
experimenter's: no client sends them, but where losses weigh (`fairness.power`). A
strategy's messages to its stages and gates that are shown get no noise, see
`accounting`. Likelihoods in place of losses, whose sensitivity is not bounded, are this
project's choice.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, ClientInput, ClientUpdate, Feedback, Hyper, PyTree

FEEDBACK = 1600  # purpose, folded into a client's key of the round
LEAST = 1e-6  # likelihood and share; a loss of 13.8 nats at most is known then


def blur(values: Array, deviation: Array, key: Array) -> Array:
    """Values in [0, 1], others at its ends, with noise and in [0, 1] again.

    Args:
      values: float32 of any shape; NaN stays.
      deviation: [] float32, standard deviation of the noise.
      key: a JAX key, consumed.
    """
    noise = deviation * jax.random.normal(key, values.shape)
    return jnp.clip(jnp.clip(values, 0.0, 1.0) + noise, 0.0, 1.0)


def blur_loss(loss: Array, deviation: Array, key: Array) -> Array:
    """As `blur`, of losses in nats by their likelihoods: at most -log(`LEAST`)."""
    likelihood = blur(jnp.exp(-loss), deviation, key)
    return -jnp.log(jnp.maximum(likelihood, LEAST))


def blur_feedback(
    feedback: Feedback, slot: Array, positions: Array, deviation: Array, key: Array
) -> Feedback:
    """ONE client's feedback with noise on every number.

    Every slot counts as used, as whether it was is one of the numbers that the noise
    hides. Slots that are not valid stay as they are, but for the probe.

    Args:
      feedback: leaves [G, K].
      slot: [G, K] bool, the slots that the client has trained.
      positions: [] float32 that the client has trained on, padding included, which the
        server knows.
      deviation: [] float32, standard deviation of the noise on each number.
      key: a JAX key, consumed.
    """
    keys = jax.random.split(key, 6)
    routed = jnp.maximum(blur(feedback.routed, deviation, keys[0]), LEAST)
    noisy = Feedback(
        accuracy=blur(feedback.accuracy, deviation, keys[1]),
        loss=blur_loss(feedback.loss, deviation, keys[2]),
        frequency=blur(feedback.frequency, deviation, keys[3]),
        load=routed * positions,
        routed=routed,
        peak=blur(feedback.peak, deviation, keys[4]),
    )
    known = feedback.replace(probe=None)
    noisy = jax.tree.map(lambda new, old: jnp.where(slot, new, old), noisy, known)
    if feedback.probe is None:
        return noisy
    return noisy.replace(probe=blur_loss(feedback.probe, deviation, keys[5]))


def blur_report(report: PyTree, deviation: Array, key: Array) -> PyTree:
    """A strategy's report with noise on every number, which is in [0, 1]."""
    leaves, tree = jax.tree.flatten(report)
    keys = jax.random.split(key, max(len(leaves), 1))
    noisy = [blur(x, deviation, k) for x, k in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(tree, noisy)


def hide_feedback(
    update: ClientUpdate,
    inputs: ClientInput,
    positions: Array,
    hyper: Hyper,
    key: Array,
) -> ClientUpdate:
    """ONE client's update with noise on all that it reports beside it.

    Args:
      update: the client's result.
      inputs: of the client, with the slots that it has trained.
      positions: [] float32, see `blur_feedback`.
      hyper: gives `privacy.feedback_noise`.
      key: the client's key of the round, not consumed.
    """
    own, other = jax.random.split(jax.random.fold_in(key, FEEDBACK))
    deviation = hyper.privacy.feedback_noise
    numbers = inputs.slot, positions, deviation, own
    return update.replace(
        feedback=blur_feedback(update.feedback, *numbers),
        report=blur_report(update.report, deviation, other),
    )
