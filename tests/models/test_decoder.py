"""Pretrained decoders give the logits of `transformers`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FAMILIES, ask_transformers, make_tokens, save_checkpoint

from fedmoe_jax.models.decoder import decode, list_rates
from fedmoe_jax.pretrained.architecture import Rope, read_architecture
from fedmoe_jax.pretrained.weights import read_weights

LOGITS = np.load(Path(__file__).parent / "logits.npz")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    folder = save_checkpoint(tmp_path, family)
    arch = read_architecture(folder)
    logits = decode(
        read_weights(arch, folder, "float32"), jnp.asarray(make_tokens()), arch
    )
    np.testing.assert_allclose(logits, LOGITS[family], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_library_that_is_installed(family):
    pytest.importorskip("transformers", reason="needs PyTorch and transformers")
    np.testing.assert_allclose(ask_transformers(family), LOGITS[family], atol=1e-4)


def test_rates_by_hand():
    """Of four numbers a head: one pair turns by 1 radian a position, one by 0.01."""
    np.testing.assert_allclose(list_rates(Rope(1e4), 4), [1, 0.01])
    np.testing.assert_allclose(list_rates(Rope(1e4, "linear", 2.0), 4), [0.5, 0.005])
    # 100 positions hold 15.9 waves of the first and a sixth of a wave of the second.
    stretched = Rope(1e4, "llama3", 8.0, low=1.0, high=4.0, context=100)
    np.testing.assert_allclose(list_rates(stretched, 4), [1, 0.01 / 8])
    # 1,200 positions hold 1.91 waves of the second: 0.303 of the way from 1 to 4.
    between = stretched._replace(context=1200)
    share = (12 / (2 * np.pi) - 1) / 3
    expected = (1 - share) * 0.01 / 8 + share * 0.01
    np.testing.assert_allclose(list_rates(between, 4), [1, expected])
