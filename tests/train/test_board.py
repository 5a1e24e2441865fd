"""TensorBoard events are a convenience: they end where they cannot be written."""

import errno

import pytest
from tensorboardX.record_writer import RecordWriter

from fedmoe_jax.train.board import open_board


@pytest.mark.parametrize("method", ["write", "flush"])
def test_open_board_warns_once_of_a_full_disk(tmp_path, monkeypatch, capsys, method):
    def fail(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_board(tmp_path, 0) as show:
        monkeypatch.setattr(RecordWriter, method, fail)
        for number in (1, 2, 3):
            show({"round": number, "train_loss": 0.5})
    told = f"no more TensorBoard events in {tmp_path} (No space left on device)"
    assert capsys.readouterr().err == f"warning: {told}\n"


def test_open_board_does_without_a_folder(tmp_path, capsys):
    with open_board(tmp_path / "none", 0) as show:
        show({"round": 1, "train_loss": 0.5})
    assert "warning: no more TensorBoard events" in capsys.readouterr().err
