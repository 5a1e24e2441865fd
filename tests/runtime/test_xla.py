"""Flags that are set before JAX looks at its devices."""

import os
import warnings
from types import SimpleNamespace

import jax
import pytest

from fedmoe_jax.runtime import xla

MANY = " ".join((*xla.CPU_FLAGS, xla.ONE_THREAD))
FEW = " ".join(xla.CPU_FLAGS)


@pytest.fixture
def told(monkeypatch):
    """The settings that were made, in a world with eight cores."""
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setattr(xla, "count_cores", lambda: 8)
    monkeypatch.setattr(xla.importlib.metadata, "version", lambda _: "0.10.9")
    monkeypatch.setenv("XLA_FLAGS", "")
    return settings


@pytest.mark.parametrize(
    ("asked", "processes", "devices", "flags"),
    [
        (0, 1, 8, MANY),  # every core a device
        (8, 1, 8, MANY),
        (9, 1, 8, FEW),  # refused later, by `build_mesh`
        (2, 1, 2, FEW),
        (1, 1, 1, FEW),
        (0, 2, 4, MANY),  # two processes share the cores
        (0, 16, 1, FEW),
    ],
)
def test_devices_and_flags(told, asked, processes, devices, flags):
    xla.set_cpu_devices(asked, processes)
    assert told == {"jax_num_cpu_devices": devices}
    assert os.environ["XLA_FLAGS"] == flags


def test_flags_of_the_user_stay(told, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    xla.set_cpu_devices(0)
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"
    assert told == {"jax_num_cpu_devices": 8}
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    told.clear()
    xla.set_cpu_devices(0)
    assert told == {}


def test_an_unknown_release_gets_no_flags(told, monkeypatch):
    monkeypatch.setattr(xla.importlib.metadata, "version", lambda _: "0.11.0")
    xla.set_cpu_devices(0)
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize(
    ("platforms", "kept"),
    [(None, None), ("cpu", None), ("cuda", "cuda,cpu"), ("cuda,cpu", None)],
)
def test_the_host_stays_within_reach(told, monkeypatch, platforms, kept):
    monkeypatch.setattr(xla, "jax", SimpleNamespace(config=SimpleNamespace()))
    xla.jax.config.jax_platforms = platforms
    xla.jax.config.update = told.__setitem__
    xla.keep_host()
    assert told == ({"jax_platforms": kept} if kept else {})


def test_programs_are_kept_unless_told_where(monkeypatch, tmp_path):
    folder, shortest = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in (folder, shortest)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update(folder, None)
        xla.keep_programs()
        mine = f"{tmp_path}/fedmoe_jax/programs-{xla.name_processor()}"
        assert getattr(jax.config, folder) == mine
        jax.config.update(folder, "/told")
        xla.keep_programs()
        assert getattr(jax.config, folder) == "/told"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_processors_that_differ_share_no_programs(monkeypatch):
    names = []
    for features in ("fpu avx2", "fpu avx2 avx512f"):
        text = f"processor : 0\nmodel name : AMD EPYC\nflags : {features}\n"
        monkeypatch.setattr(xla.Path, "read_text", lambda path, text=text: text)
        names.append(xla.name_processor())
    assert len(set(names)) == 2
    assert xla.name_processor() == names[1]


@pytest.fixture
def no_folder():
    """JAX without a folder of programs, as it was before afterwards."""
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    jax.config.update(name, None)
    with warnings.catch_warnings():
        yield lambda: getattr(jax.config, name)
    jax.config.update(name, before)


def test_programs_are_not_kept_without_a_home(monkeypatch, no_folder, capsys):
    def unknown(user):
        raise KeyError(user)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    xla.keep_programs()
    assert no_folder() is None and capsys.readouterr().err == ""


def test_programs_are_not_kept_where_nothing_can_be_written(
    monkeypatch, no_folder, capsys, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    xla.keep_programs()
    told = capsys.readouterr().err
    assert no_folder() is None and told.count("\n") == 1
    assert told.startswith("warning: compiled programs are not kept, as ")
