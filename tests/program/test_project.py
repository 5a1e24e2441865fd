"""The files that set the project up agree with each other and with the code."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU = "requirements-cpu.txt"
FILES = ["Makefile", ".ci/run", "requirements.txt", "requirements-tpu.txt", CPU]
OWN = {"fedmoe_jax", "configs", "launch", "benchmarks", "checkpoints", "factories"}
OWN |= {path.stem for path in (ROOT / "benchmarks" / "runners").glob("*.py")}


def _lines(name):
    lines = (ROOT / name).read_text().splitlines()
    return [bare for line in lines if (bare := line.split("#")[0].strip())]


def _required():
    return {canonicalize_name(r.name): r for r in map(Requirement, _lines(CPU))}


def _make(*args, cwd=ROOT, **variables):
    """Runs make with this Python, not with what a surrounding make hands down."""
    handed = ("MAKE", "MFLAGS", "DEVICE", "VENV", "PYTHON")
    env = {k: v for k, v in os.environ.items() if not k.startswith(handed)}
    env |= {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["make", *args], cwd=cwd, env=env, capture_output=True, text=True
    )


def _imports():
    """Top-level modules that the project's Python files import, except its own."""
    files = [ROOT / "launch.py"]
    for folder in ("fedmoe_jax", "configs", "tests"):
        files += (ROOT / folder).rglob("*.py")
    files += (ROOT / "benchmarks").glob("*.py")  # runners have packages of their own
    names = set()
    for file in filter(Path.exists, files):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - OWN


def test_gpu_requirements_build_on_cpu_requirements():
    lines = _lines("requirements.txt")
    assert lines[0] == f"-r {CPU}"
    named = {str(Requirement(line)) for line in lines[1:]}
    assert named == {
        "jax[cuda12]",
        "flax",
        "optax",
        "orbax-checkpoint",
        "tensorflow-datasets",
        "chex",
        "absl-py",
    }
    assert {canonicalize_name(Requirement(n).name) for n in named} <= set(_required())


def test_tpu_requirements_build_on_cpu_requirements():
    assert _lines("requirements-tpu.txt") == [f"-r {CPU}", "jax[tpu]"]


def test_the_package_requires_what_the_requirements_file_lists():
    product, tests = (ROOT / CPU).read_text().split("# Tests and style.")
    listed = [
        {str(Requirement(line.split("#")[0])) for line in part.splitlines() if line}
        for part in (re.sub(r"(?m)^#.*$", "", product), tests)
    ]
    extras = PROJECT["optional-dependencies"]
    declared = [PROJECT["dependencies"], extras["test"]]
    assert [{str(Requirement(each)) for each in part} for part in declared] == listed
    assert extras["cuda12"] == ["jax[cuda12]"]
    assert extras["tpu"] == ["jax[tpu]"]


def test_every_folder_of_the_package_is_found():
    folders = {file.parent for file in (ROOT / "fedmoe_jax").rglob("*.py")}
    assert len(folders) > 8
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.slow
def test_every_import_is_required():
    providers = metadata.packages_distributions()
    for module in sorted(_imports()):
        offered = {canonicalize_name(p) for p in providers.get(module, [module])}
        assert offered & set(_required()), f"{module} is missing in {CPU}"


def test_installed_versions_are_within_the_ranges():
    for requirement in _required().values():
        version = metadata.version(requirement.name)
        assert requirement.specifier.contains(version), f"{requirement}, not {version}"


@pytest.mark.parametrize("file", FILES)
def test_packages_come_from_the_configured_index(file):
    text = (ROOT / file).read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links|--hash", text)


def test_demo_and_tests_are_one_command_each(tmp_path):
    demo = _make("-n", "demo", f"VENV={tmp_path}", "DEVICE=cuda12")
    command = "launch.py --config=configs/compare.py:digits --workdir=runs/digits"
    assert " ".join(demo.stdout.replace("\\\n", " ").split()).endswith(command)
    assert "-r requirements.txt" in demo.stdout
    test = _make("-n", "test", f"VENV={tmp_path}", "DEVICE=cpu")
    assert test.stdout.splitlines()[-1].startswith("JAX_PLATFORMS=cpu ")
    assert " -m pytest -n logical " in test.stdout.splitlines()[-1]
    assert f"-r {CPU}" in test.stdout


@pytest.mark.parametrize(
    ("device", "file"),
    [("cpu", CPU), ("cuda12", "requirements.txt"), ("tpu", "requirements-tpu.txt")],
)
def test_a_device_has_its_requirements(tmp_path, device, file):
    setup = _make("-n", "setup", f"VENV={tmp_path}", f"DEVICE={device}")
    assert f"-r {file} " in setup.stdout and f"installed-{device}" in setup.stdout


def test_another_device_is_refused(tmp_path):
    setup = _make("-n", "setup", f"VENV={tmp_path}", "DEVICE=npu")
    assert setup.returncode == 2 and "it is cpu, cuda12 or tpu" in setup.stderr


def test_check_lints_and_leaves_out_slow_tests(tmp_path):
    check = _make("-n", "check", f"VENV={tmp_path}", "DEVICE=cpu").stdout
    assert check.index("ruff check .") < check.index("-m pytest")
    assert check.splitlines()[-1].endswith('-m "not slow"')


@pytest.mark.parametrize("name", ["a:b", "a b", "a b:c"])
def test_a_clone_may_be_in_any_folder(name, tmp_path):
    """Packages are beside it, or in the home where Python refuses to put them there."""
    clone = tmp_path / name
    clone.mkdir()
    files = ("Makefile", *(path.name for path in ROOT.glob("requirements*.txt")))
    for file in files:
        (clone / file).write_bytes((ROOT / file).read_bytes())
    made = _make("-n", "demo", "DEVICE=cpu", cwd=clone, HOME="/home/me")
    assert made.returncode == 0, made.stderr
    kept = re.search(r"(\S+)/bin/python launch.py", made.stdout)[1]
    expected = r"/home/me/.cache/fedmoe_jax/venv-\d+" if ":" in name else r"\.venv"
    assert re.fullmatch(expected, kept)
    assert f"venv --clear {kept} " in made.stdout


def test_installed_packages_stay_in_use(tmp_path):
    stamp = tmp_path / "installed-cuda12"
    stamp.touch()
    assert "pip install" not in _make("-n", "test", f"VENV={tmp_path}").stdout
    os.utime(stamp, (0, 0))
    assert "pip install" in _make("-n", "test", f"VENV={tmp_path}").stdout


def test_a_linked_environment_is_not_emptied(tmp_path):
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.mkdir()
    (kept / "file").touch()
    link.symlink_to(kept)
    made = _make("setup", "DEVICE=cpu", f"VENV={link}")
    assert made.returncode != 0 and made.stdout == ""
    assert f"{link} is a link" in made.stderr and (kept / "file").exists()
    (link / "installed-cpu").touch()
    assert _make("setup", "DEVICE=cpu", f"VENV={link}").returncode == 0


def test_old_python_gets_one_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho False\n")
    old.chmod(0o755)
    ran = _make("test", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert ran.returncode == 2 and ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1 and "Python 3.11" in ran.stderr
    assert not (tmp_path / "venv").exists()


def test_every_module_has_its_tests_at_the_same_place():
    package, tests = ROOT / "fedmoe_jax", ROOT / "tests"
    # Records alone, and defaults, which the tests of the config read.
    without = {Path("base.py"), Path("configs/default.py")}
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    named = {path for path in modules if not path.name.startswith("__")}
    mirrored = {path.with_name(f"test_{path.name}") for path in named - without}
    assert len(mirrored) > 80
    assert {path for path in mirrored if not (tests / path).exists()} == set()


def _rooms():
    """Folders and files of the package -> those that they import, also in functions."""
    package, rooms = ROOT / "fedmoe_jax", {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found = rooms.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            own = (n.split(".")[1] for n in names if n.startswith("fedmoe_jax."))
            found |= {name for name in own if name != parts[0]}
    return rooms


def test_no_rooms_of_the_package_import_each_other_in_a_circle():
    rooms = _rooms()
    assert "types" in rooms["round"] and "world" in rooms["train"]
    left = dict(rooms)
    while ground := [room for room, needs in left.items() if not needs & left.keys()]:
        for room in ground:
            del left[room]
    assert left == {}


def test_purposes_that_are_folded_into_a_runs_key_differ():
    """Numbers like 2**32 - 3, which no number of a round is."""
    found = []
    for path in sorted((ROOT / "fedmoe_jax").rglob("*.py")):
        numbers = re.findall(r"(?<![\w*])2\*\*32 - (\d+)", path.read_text())
        found += [(int(number), path.name) for number in numbers]
    small = [number for number, _ in found if number < 100]
    assert len(small) == len(set(small)) >= 8, sorted(found)
