"""The version: that of the sources beside which `pyproject.toml` lies, or installed."""

import tomllib
from pathlib import Path

import pytest

import fedmoe_jax
from fedmoe_jax import version
from fedmoe_jax.runtime import origin

ROOT = Path(__file__).parents[1]


def test_a_checkout_has_the_version_of_its_project():
    text = (ROOT / "pyproject.toml").read_text()
    expected = tomllib.loads(text)["project"]["version"]
    assert version.find_version() == fedmoe_jax.__version__ == expected
    assert origin.find_origin.__wrapped__()["fedmoe_jax"] == expected


@pytest.mark.parametrize(
    "text",
    [None, "[", "", "[project]\nname = 'other'\nversion = '9'", "[project]\n"],
)
def test_a_package_without_its_project_has_the_installed_version(
    tmp_path, monkeypatch, text
):
    project = tmp_path / "pyproject.toml"
    if text is not None:
        project.write_text(text)
    monkeypatch.setattr(version, "find_installed", lambda name: f"{name} 7")
    assert version.find_version(project) == "fedmoe_jax 7"
    project.write_text("[project]\nname = 'fedmoe_jax'\nversion = '8'\n")
    assert version.find_version(project) == "8"


def test_the_version_of_what_is_not_installed_is_unknown():
    assert version.find_installed("no-such-package") is None


def test_the_citation_has_the_version_of_the_project():
    assert (
        f"\nversion: {version.find_version()}\n" in (ROOT / "CITATION.cff").read_text()
    )
