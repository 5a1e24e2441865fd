"""Records from outside the package: what joins, what is refused, how runs resume."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from factories import SMALL

from fedmoe_jax import plugins
from fedmoe_jax.config import list_options, validate
from fedmoe_jax.configs import default
from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.options import COUNT, SHARE, TRACED, Option, UserError
from fedmoe_jax.program import make_hyper
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.tables import find_tables, list_plugins

ROOT = Path(__file__).parents[1]
RATE = Option("mine.rate", SHARE, "weight of fitness", TRACED, 0.3)
MINE = STRATEGIES["greedy"]._replace(about="Mine.", options=(RATE,))


@pytest.fixture
def join(monkeypatch):
    """Joins a module that defines the given tables; afterwards it leaves again."""
    names = []

    def join(name="my_module", **tables):
        module = types.ModuleType(name)
        vars(module).update(tables)
        monkeypatch.setitem(sys.modules, name, module)
        names.append(name)
        plugins.load_plugins(name)

    yield join
    for name in names:
        plugins.leave(name)


def test_records_join_tables_and_their_options_the_config(join):
    before = default.get_config()
    join(STRATEGIES={"mine": MINE}, DATASETS={"others": DATASETS["digits"]})
    config = default.get_config()
    assert config.plugins == ("my_module",) and config.mine.rate == 0.3
    assert list_options()["mine.rate"] == RATE
    config.update_from_flattened_dict({"strategy": "mine", "data.name": "others"})
    validate(config)
    config.mine.rate = 0.25
    assert make_hyper(config).mine.rate == 0.25
    config.mine.rate = 1.5
    with pytest.raises(UserError, match=r"mine.rate=1.5 is not allowed; .* \[0, 1\]"):
        validate(config)
    plugins.leave("my_module")
    assert default.get_config() == before and "mine" not in STRATEGIES
    assert "others" not in DATASETS


def test_records_may_share_an_option_also_of_the_package(join):
    own = list_options()["flex_moe.low"]
    both = MINE._replace(options=(RATE, own))
    join(STRATEGIES={"mine": MINE, "mine_too": both})
    config = default.get_config()
    assert config.mine.to_dict() == {"rate": 0.3} and config.flex_moe.low == 0.8


def test_a_module_that_joins_again_replaces_its_records(join):
    join(STRATEGIES={"mine": MINE})
    renewed = MINE._replace(about="Renewed.")
    join(STRATEGIES={"mine": renewed})
    assert STRATEGIES["mine"] is renewed
    assert list_plugins() == ("my_module",)


def test_a_module_that_joins_again_keeps_its_place(join):
    join("one", STRATEGIES={"first": MINE})
    join("two", STRATEGIES={"second": MINE})
    join("one", STRATEGIES={"first": MINE, "third": MINE})
    assert list_plugins() == ("one", "two")
    assert list(STRATEGIES)[-3:] == ["first", "third", "second"]
    with pytest.raises(UserError, match="'greedy', which is taken"):
        join("one", STRATEGIES={"greedy": MINE})
    assert list_plugins() == ("one", "two") and "third" in STRATEGIES


def test_load_plugins_reads_the_file_of_a_module_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "from fedmoe_jax.strategies import STRATEGIES as S\nSTRATEGIES = "
    try:
        for name in ("first", "second"):
            code = f"{text}{{{name!r}: S['greedy']._replace(about='Mine.')}}\n"
            (tmp_path / "edited_module.py").write_text(code)
            plugins.load_plugins("edited_module")
            assert list(STRATEGIES)[-1] == name and "first" not in list(STRATEGIES)[:-1]
    finally:
        plugins.leave("edited_module")


def test_tables_that_a_module_imports_are_not_its_own(join):
    join(STRATEGIES={"mine": MINE}, DATASETS=DATASETS)
    assert set(DATASETS) >= {"digits", "synthetic"}
    plugins.leave("my_module")
    assert "digits" in DATASETS


REFUSED = {
    "taken": (
        dict(STRATEGIES={"greedy": MINE}),
        "STRATEGIES of my_module has 'greedy'",
    ),
    "no table": (dict(strategies={"mine": MINE}), "defines no table; .* STRATEGIES"),
    "a list": (dict(STRATEGIES=[MINE]), "is a list; allowed: a dict"),
    "no record": (
        dict(STRATEGIES={"mine": lambda: MINE}),
        "has 'mine', a value of type function; allowed: Strategy",
    ),
    "no loader": (
        dict(DATASETS={"mine": MINE}),
        "has 'mine', a value of type Strategy; allowed: a function",
    ),
    "another meaning": (
        dict(STRATEGIES={"m": MINE._replace(options=(RATE._replace(name="seed"),))}),
        "the option 'seed', which is a field",
    ),
    "two meanings": (
        dict(
            STRATEGIES={
                "mine": MINE,
                "too": MINE._replace(options=(RATE._replace(allowed=COUNT),)),
            }
        ),
        "the option 'mine.rate', which is a field",
    ),
    "no default": (
        dict(STRATEGIES={"m": MINE._replace(options=(RATE._replace(default=None),))}),
        "'mine.rate' without a default",
    ),
    "list as default": (
        dict(STRATEGIES={"m": MINE._replace(options=(RATE._replace(default=[1]),))}),
        "'mine.rate' with a default that is a list; allowed: bool, int, float",
    ),
    "number for a name": (dict(STRATEGIES={3: MINE}), "has 3; allowed: names"),
    "no name": (
        dict(STRATEGIES={"m": MINE._replace(options=(RATE._replace(name="a.b.c"),))}),
        "the option 'a.b.c'; allowed: names such as",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_plugins_refuses_in_one_line(join, case):
    tables, told = REFUSED[case]
    before = {name: dict(table) for name, table in find_tables().items()}
    with pytest.raises(UserError, match=told) as error:
        join(**tables)
    assert "\n" not in str(error.value)
    assert find_tables() == before and list_plugins() == ()


@pytest.mark.parametrize("name", ["mine.py", "one,two", "folder/mine", ["one"]])
def test_load_plugins_takes_names_of_modules_alone(name):
    with pytest.raises(UserError, match="is no name of a module; .* each by itself"):
        plugins.load_plugins(name)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = 1\nimport none_such\n", "line 2: ModuleNotFoundError: .*none_such"),
        ("a = dict(1)\n", "line 1: TypeError: "),
        ("def f(:\n", "SyntaxError: .*line 1"),
    ],
)
def test_a_plugin_that_cannot_be_imported_says_where(
    tmp_path, monkeypatch, text, fault
):
    name = f"half_module{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"{name}.* cannot be imported .*{fault}"):
        plugins.load_plugins(name)


def test_a_plugin_must_be_that_of_the_config(join):
    join(STRATEGIES={"mine": MINE})
    config = default.get_config()
    plugins.leave("my_module")
    del config.mine
    with pytest.raises(UserError, match="--plugins=my_module; here it is .*None"):
        validate(config)


MODULE = '''
"""A strategy of one's own, with one option."""

import jax.numpy as jnp

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.base import Strategy
from fedmoe_jax.options import SHARE, TRACED, Option


def assign(evidence, hyper, sizes, key):
    scores = hyper.mine.rate * evidence.fitness - jnp.arange(sizes.num_experts)[None]
    return top_k(scores, evidence.capacity, sizes.max_held)


STRATEGIES = {
    "mine": Strategy(
        about="Prefers low expert ids.",
        assign=assign,
        options=(Option("mine.rate", SHARE, "weight of fitness", TRACED, 0.3),),
    )
}
'''


def start(folder, *words):
    env = os.environ | {"PYTHONPATH": "", "XLA_FLAGS": "", "HOME": str(folder)}
    sizes = SMALL | {"num_rounds": 2, "data.name": "digits", "checkpoint.every": 1}
    fields = [f"--config.{name}={value}" for name, value in sizes.items()]
    ran = subprocess.run(
        [sys.executable, ROOT / "launch.py", "--workdir=run", *fields, *words],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stderr


@pytest.mark.slow
def test_launch_reads_plugins_before_the_config(tmp_path):
    """From the current folder; a run without its plug-in ends in one line."""
    (tmp_path / "my_module.py").write_text(MODULE)
    own = ("--config.strategy=mine", "--config.mine.rate=0.1", "--plugins=my_module")
    code, err = start(tmp_path, *own)
    assert code == 0, err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # No client prefers the last expert, and those that hold one hold the first.
    assert [row["expert_load"][-1] for row in rows] == [0, 0]
    assert all(row["expert_load"][0] > 0 for row in rows)
    code, err = start(tmp_path, "--config.strategy=mine")
    assert code == 2 and len(err.splitlines()) == 1
    assert "allowed: --plugins=my_module (from Python load_plugins('my_module'))" in err


@pytest.mark.slow
def test_a_plugin_that_computes_while_it_is_imported_is_refused(tmp_path):
    text = MODULE + "\nZEROS = jnp.zeros(3)\n"
    (tmp_path / "my_module.py").write_text(text)
    code, err = start(tmp_path, "--plugins=my_module")
    assert code == 2 and len(err.splitlines()) == 1
    assert "--plugins=my_module computes with JAX while it is imported" in err
