"""Settings of JAX that change numbers are seen, and refused where they would mix."""

import jax
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime import settings


def test_describe_settings_names_those_that_are_not_jax_s_own():
    assert settings.describe_settings() == ""
    with jax.threefry_partitionable(False), jax.default_matmul_precision("highest"):
        told = "jax_default_matmul_precision=highest jax_threefry_partitionable=False"
        assert settings.describe_settings() == told


def test_check_settings_refuses_another_precision():
    saved = settings.read_settings()
    settings.check_settings({}, "an older checkpoint")
    with jax.default_matmul_precision("highest"):
        told = "precision=highest is not allowed, as it was computed with None; allowed"
        with pytest.raises(UserError, match=told):
            settings.check_settings(saved, "it")
    settings.check_settings(saved, "it")
