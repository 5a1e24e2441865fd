"""The folder of a run keeps what the run was started with."""

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.train.workdir import keep_devices


def test_keep_devices_refuses_a_file_that_has_changed_since_the_start(tmp_path):
    mine, kept = tmp_path / "mine.csv", tmp_path / "run.csv"
    mine.write_text("memory,flops\n4e9,1e11\n")
    keep_devices(kept, str(mine))
    keep_devices(kept, str(mine))
    mine.write_text("memory,flops\n4e9,2e11\n")
    with pytest.raises(UserError, match="devices.csv=.*has changed.*run.csv"):
        keep_devices(kept, str(mine))
    assert kept.read_text() == "memory,flops\n4e9,1e11\n"
