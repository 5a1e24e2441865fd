"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import numpy as np

from configs import default
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train import run as train
from fedmoe_jax.types import Strategy

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_guides_strategy_is_a_file_and_a_row(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 45
    names = {}
    exec(compile(code, "rotating.py", "exec"), names)
    assert isinstance(names["ROTATING"], Strategy)
    monkeypatch.setitem(STRATEGIES, "rotating", names["ROTATING"])
    config = default.get_config("smoke")
    config.strategy, config.run.num_devices = "rotating", 1
    run = tmp_path / "run"
    assert train.train(config, run, stop=lambda: False, label="run", profile=False)
    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) == config.num_rounds
    with np.load(run / "final.npz") as arrays:
        held, capacity = arrays["times_held"], arrays["belief"]
    np.testing.assert_array_equal(held.sum(1), config.num_rounds * capacity)
    assert (np.ptp(held, axis=1) <= 1).all()  # nobody holds one twice before all once


def test_every_strategy_has_its_row():
    table = README[README.index("## Strategies") : README.index("### Your own")]
    for name in STRATEGIES:
        plain = name.removesuffix("_active")
        assert f"`{name}`" in table or f"`{plain}`" in table, name
