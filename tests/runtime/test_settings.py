"""Settings of JAX that change numbers are seen, and refused where they would mix."""

import contextlib
import json

import jax
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime import settings


@contextlib.contextmanager
def setting(name, value):
    usual = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, usual)


def test_describe_settings_names_those_that_are_not_jax_s_own():
    assert settings.describe_settings() == ""
    with jax.threefry_partitionable(False), jax.default_matmul_precision("highest"):
        told = "jax_default_matmul_precision=highest jax_threefry_partitionable=False"
        assert settings.describe_settings() == told


def test_this_jax_has_every_setting_and_its_usual_value():
    assert settings.read_settings() == settings.DEFAULTS


def test_tell_settings_is_silent_unless_one_is_changed(capsys):
    settings.tell_settings()
    assert capsys.readouterr().out == ""
    with jax.default_matmul_precision("highest"):
        settings.tell_settings()
    assert capsys.readouterr().out == (
        "JAX is set to other numbers than usual: jax_default_matmul_precision=highest\n"
    )


def test_check_settings_refuses_another_precision():
    saved = settings.read_settings()
    settings.check_settings({}, "an older checkpoint")
    with jax.default_matmul_precision("highest"):
        told = (
            "precision=highest is not allowed, as it was computed with None; allowed: "
            "no JAX_DEFAULT_MATMUL_PRECISION in the environment"
        )
        with pytest.raises(UserError, match=told):
            settings.check_settings(saved, "it")
    settings.check_settings(saved, "it")


def test_check_settings_refuses_an_offset_of_all_seeds(monkeypatch):
    usual = settings.read_settings()
    with setting("jax_random_seed_offset", 7):
        saved = settings.read_settings()
        assert settings.describe_settings() == "jax_random_seed_offset=7"
        told = "jax_random_seed_offset=7 is not allowed, as it was computed with 0"
        with pytest.raises(UserError, match=told):
            settings.check_settings(usual, "it")
    with pytest.raises(UserError, match="allowed: JAX_RANDOM_SEED_OFFSET=7 in"):
        settings.check_settings(saved, "it")


def test_settings_are_those_that_json_has():
    with setting("jax_explicit_x64_dtypes", "allow"):
        saved = json.loads(json.dumps(settings.read_settings()))
        assert settings.describe_settings() == "jax_explicit_x64_dtypes=allow"
        settings.check_settings(saved, "it")
    with pytest.raises(UserError, match="JAX_EXPLICIT_X64_DTYPES=allow"):
        settings.check_settings(saved, "it")
