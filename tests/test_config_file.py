"""Files of configs on the command line, whose paths may have colons."""

import pytest

from fedmoe_jax import config_file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{}/a.py", ("{}/a.py",)),
        ("{}/a.py:smoke", ("{}/a.py", "smoke")),
        ("{}/a.py:x:y", ("{}/a.py", "x:y")),
        ("{}/b:c/a.py", ("{}/b:c/a.py",)),
        ("{}/b:c/a.py:smoke", ("{}/b:c/a.py", "smoke")),
        ("{}/none.py:smoke", ("{}/none.py", "smoke")),
    ],
)
def test_split_config_takes_colons_of_a_file_that_is_there(text, parts, tmp_path):
    (tmp_path / "b:c").mkdir()
    for file in ("a.py", "b:c/a.py"):
        (tmp_path / file).touch()
    found = config_file.split_config(text.format(tmp_path))
    assert found == tuple(part.format(tmp_path) for part in parts)
