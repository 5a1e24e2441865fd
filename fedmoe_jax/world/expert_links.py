"""Links between the gate and its experts, which sit on other machines.

State: a latent [E] of standard normals, moved by `gauss_markov_step`, the shadowing of
each expert's link. All clients' gates have the same links, as evaluation computes each
expert once for all of them. On top of it every example has a Rayleigh fading of its
own, which is no state: see `links`.
"""

import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import (
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    STATIC,
    TRACED,
    Option,
    Range,
)
from fedmoe_jax.types import Array, ExpertLinks, Hyper, Keys, Sizes
from fedmoe_jax.world.processes import gauss_markov_start, gauss_markov_step
from fedmoe_jax.world.step import LINKS, View


class Shadows(struct.PyTreeNode):
    """The links in one round.

    Attributes:
      latent: [E] float32.
      simulated: [] bool, whether clients train with the links by now.
    """

    latent: Array
    simulated: Array


def has_links(config: ConfigDict) -> bool:
    """Whether experts are behind links."""
    return config.expert_links.kind == "wireless"


def init_links(keys: Keys, hyper: Hyper, sizes: Sizes) -> Shadows:
    """Draws from the stationary law."""
    latent = gauss_markov_start(keys.of(LINKS), (sizes.num_experts,))
    return Shadows(latent, jnp.asarray(hyper.expert_links.start <= 0))


def step_links(state: Shadows, keys: Keys, round: Array, hyper: Hyper) -> Shadows:
    """One step of the shadowing, and of the two stages of training."""
    numbers = hyper.expert_links
    latent = gauss_markov_step(keys.of(LINKS), state.latent, numbers.persistence)
    return Shadows(latent, round >= numbers.start)


def mean_snr(latent: Array, hyper: Hyper) -> Array:
    """`10^((snr + spread z) / 10)`, linear: log-normal shadowing. [E] float32 > 0.

    Args:
      latent: z, [E] float32.
      hyper: gives `expert_links.snr` and `expert_links.spread`, dB.
    """
    numbers = hyper.expert_links
    return 10 ** ((numbers.snr + numbers.spread * latent) / 10)


def apply_links(state: Shadows, view: View, hyper: Hyper) -> View:
    """Puts the experts behind their links."""
    snr = mean_snr(state.latent, hyper)
    return view.replace(links=ExpertLinks(snr, state.simulated))


LINKS_PROCESS = Process(
    about="Experts sit behind radio links to the gate, which may see their state.",
    is_on=has_links,
    init=init_links,
    step=step_links,
    apply=apply_links,
    options=(
        Option(
            "expert_links.kind",
            ("none", "wireless"),
            "links between the gate and its experts, in training and in evaluation, "
            "which also scores the model without them",
            STATIC,
        ),
        Option(
            "expert_links.snr",
            Range(-100, 100),
            "dB, signal-to-noise ratio of an expert's link, the median over experts",
            TRACED,
        ),
        Option(
            "expert_links.spread",
            Range(0, 50),
            "dB, standard deviation over experts and rounds: shadowing",
            TRACED,
        ),
        Option(
            "expert_links.persistence",
            SHARE,
            "correlation of the shadowing from round to round",
            TRACED,
        ),
        Option(
            "expert_links.csi",
            SHARE,
            "correlation of the known and the true fading of an example",
            TRACED,
        ),
        Option(
            "expert_links.sight",
            SHARE,
            "factor of what the gate sees of its links; 0: nothing, a plain gate",
            TRACED,
        ),
        Option(
            "expert_links.price",
            NON_NEGATIVE,
            "taken off the gate's logit of an expert for each deadline of an answer "
            "that its link takes",
            TRACED,
        ),
        Option(
            "expert_links.airtime",
            POSITIVE,
            "deadlines of an answer that the features take to an expert and back at an "
            "SNR of 0 dB; a link takes 1 at most",
            TRACED,
        ),
        Option(
            "expert_links.start",
            Range(0),
            "first rounds in which clients train with perfect links; 0: one stage",
            TRACED,
        ),
    ),
)
