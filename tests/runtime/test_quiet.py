"""What libraries would say beside the program's own lines."""

import os
import subprocess
import sys
from pathlib import Path

from factories import find_importable

HOMELESS = """
from fedmoe_jax.runtime.quiet import quiet_matplotlib
quiet_matplotlib()
import matplotlib
print(matplotlib.get_cachedir())
"""


def test_matplotlib_says_nothing_of_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    places = {"HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}
    env = {k: v for k, v in os.environ.items() if k not in places}
    env |= {"PYTHONPATH": find_importable(), "TMPDIR": str(tmp_path)}
    env["HOME"] = str(tmp_path / "file" / "home")
    words = [sys.executable, "-c", HOMELESS]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
