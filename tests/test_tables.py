"""The tables that plug-ins join, and the names and defaults of those that have."""

import subprocess
import sys

from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.measures import MEASURES
from fedmoe_jax.models import MODELS
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.tables import (
    PLUGINS,
    Plugin,
    find_tables,
    list_defaults,
    list_plugins,
)
from fedmoe_jax.tasks import TASKS
from fedmoe_jax.world import PROCESSES


def test_find_tables_gives_the_tables_themselves():
    expected = {
        "DATASETS": DATASETS,
        "TASKS": TASKS,
        "MODELS": MODELS,
        "STRATEGIES": STRATEGIES,
        "PROCESSES": PROCESSES,
        "MEASURES": MEASURES,
    }
    found = find_tables()
    assert list(found) == list(expected)
    for name, table in expected.items():
        assert found[name] is table and table, name


def test_list_plugins_and_list_defaults_keep_the_order_of_joining(monkeypatch):
    joined = {
        "second": Plugin({"TASKS": ("mine",)}, {"mine.rate": 0.3, "mine.kind": "a"}),
        "first": Plugin({}, {"other.rate": 1}),
    }
    before = list_defaults()
    for name, plugin in joined.items():
        monkeypatch.setitem(PLUGINS, name, plugin)
    assert list_plugins()[-2:] == ("second", "first")
    added = {"mine.rate": 0.3, "mine.kind": "a", "other.rate": 1}
    assert list_defaults() == before | added
    monkeypatch.delitem(PLUGINS, "second")
    assert list_defaults() == before | {"other.rate": 1}


def test_list_defaults_needs_no_jax():
    code = "import sys, fedmoe_jax.tables as t; t.list_defaults(); print(*sys.modules)"
    line = [sys.executable, "-c", code]
    loaded = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "fedmoe_jax.tables" in loaded.split()
    assert not {"jax", "numpy"} & set(loaded.split())
