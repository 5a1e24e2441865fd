"""A folder has one owner at a time, and none when that one is dead."""

import errno
import fcntl
import subprocess
import sys
import threading

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.lock import lock, take_turn

HOLD = """
import sys, pathlib
from fedmoe_jax.runtime.lock import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_refuses_a_second_owner_until_the_first_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        told = f"workdir={tmp_path} is in use by process {first.pid} on "
        for shared in (False, True):
            with pytest.raises(UserError, match=told), lock(tmp_path, shared=shared):
                pass
        first.kill()
    with lock(tmp_path):
        pass


def test_lock_is_shared_by_those_who_share_it(tmp_path):
    with lock(tmp_path, shared=True), lock(tmp_path, shared=True):
        told = "in use by another process"
        with pytest.raises(UserError, match=told), lock(tmp_path):
            pass


def test_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with lock(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path, monkeypatch, capsys, number
):
    def refuse(file, kind):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path), take_turn(tmp_path):
        assert capsys.readouterr().err == (
            f"warning: the file system of {tmp_path} has no locks; nothing else may "
            "write there until this call has ended\n"
        )


def test_take_turn_waits_for_the_other(tmp_path):
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with take_turn(tmp_path):
            order.append("second")

    other = threading.Thread(target=second)
    with take_turn(tmp_path):
        other.start()
        inside.set()
        other.join(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
