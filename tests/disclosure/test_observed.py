"""Files of the observer: bounded, resumed without loss, one folder a run."""

import numpy as np
import pytest
from factories import SMALL, make_config, run_alone, stop_at, tiny_study

import fedmoe_jax
from fedmoe_jax.configs import default
from fedmoe_jax.disclosure import observed
from fedmoe_jax.disclosure.observed import (
    check_size,
    count_bytes,
    join_chunks,
    list_chunks,
    read_exposed,
    read_observed,
    resume,
    write_chunk,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.train.compare import compare


def small_config(**changes):
    config = default.get_config("smoke")
    fields = {"run.tensorboard": False, "privacy.observe": True}
    fields |= {"partition.test_share": 0.3}
    config.update_from_flattened_dict(SMALL | fields | changes)
    return config


def make_chunk(first, rounds=2):
    numbers = np.arange(first, first + rounds)
    return {"client": numbers[:, None], "held": numbers[:, None, None, None] > 3}


def write_three(folder):
    for last in (2, 4, 6):
        write_chunk(folder, last, make_chunk(last - 1))


def test_count_bytes_by_hand():
    config = make_config(num_rounds=10, cohort_size=3)
    assert count_bytes(config, 2, 4) == 10 * (3 * 2 * 4 * 26 + 3 * 12)


def test_check_size_refuses_what_would_not_fit():
    sizes = {"num_rounds": 20_000, "cohort_size": 100, "num_clients": 100}
    config = make_config(**{"privacy.observe": True} | sizes)
    told = r"privacy\.observe=True is not allowed with num_rounds=20000, cohort_size="
    told += r"100, 4 MoE layers and num_experts=8, .* 1.69 GB; allowed: .* 1 GB a run"
    with pytest.raises(UserError, match=told):
        check_size(config, 4, 8)
    check_size(config, 1, 8)
    check_size(make_config(**sizes), 4, 8)


def test_chunks_are_read_in_the_order_of_rounds(tmp_path):
    assert read_observed(tmp_path) is None and join_chunks([]) is None
    write_three(tmp_path)
    write_chunk(tmp_path, 100, make_chunk(99))
    found = read_observed(tmp_path)
    assert found["client"][:, 0].tolist() == [1, 2, 3, 4, 5, 6, 99, 100]
    assert found["held"].dtype == bool


def test_resume_removes_rounds_that_are_run_again(tmp_path):
    write_three(tmp_path)
    resume(tmp_path, done=4, chunk=2)
    assert list(list_chunks(tmp_path)) == [2, 4]
    resume(tmp_path, done=0, chunk=2)
    assert not list_chunks(tmp_path)


def test_resume_refuses_a_run_that_lacks_rounds(tmp_path):
    write_three(tmp_path)
    list_chunks(tmp_path)[2].unlink()
    with pytest.raises(UserError, match=r"00000002\.npz is missing, .*; allowed: "):
        resume(tmp_path, done=4, chunk=2)
    assert list(list_chunks(tmp_path)) == [4, 6]


def test_read_observed_names_a_damaged_file(tmp_path):
    write_three(tmp_path)
    list_chunks(tmp_path)[4].write_bytes(b"no arrays")
    with pytest.raises(UserError, match=r"00000004\.npz is damaged .* restore it"):
        read_observed(tmp_path)


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_a_resumed_run_has_observed_every_round_once(tmp_path, monkeypatch):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    assert run_alone(small_config(), whole)
    # Killed after round 3, whose checkpoint is that of round 2.
    monkeypatch.setattr("fedmoe_jax.train.loop.save", lambda *args: {})
    assert not run_alone(small_config(), halted, stop_at(halted, 1))
    monkeypatch.undo()
    assert list(list_chunks(halted)) == [1]
    assert not run_alone(small_config(), halted, stop_at(halted, 3))
    assert list(list_chunks(halted)) == [1, 2, 3]
    assert run_alone(small_config(), halted)
    found, expected = read_observed(halted), read_observed(whole)
    assert len(found["client"]) == 4
    assert_same_arrays(found, expected)
    assert_same_arrays(read_exposed(halted), read_exposed(whole))
    run = fedmoe_jax.load_run(whole)
    assert_same_arrays(run.observed, expected)
    alone = fedmoe_jax.run(small_config())
    assert_same_arrays(alone.observed, expected)


@pytest.mark.slow
def test_runs_of_a_comparison_observe_what_they_would_have_alone(tmp_path):
    fields = {"privacy.observe": True, "partition.test_share": 0.3}
    fields |= {"partition.validation_share": 0.0}
    study = tiny_study(("greedy",), ("", "fitness.rate=0.9"), **fields)
    folders, done = compare(
        study, tmp_path / "study", stop=lambda: False, profile=False
    )
    assert done and len(folders) == 4
    held = [read_observed(folder)["held"] for folder in folders]
    assert all(len(each) == 4 for each in held)
    assert len({each.tobytes() for each in held}) >= 3
    exposed = [read_exposed(folder) for folder in folders]
    assert len({each["member_loss"].tobytes() for each in exposed}) == 4
    assert observed.FOLDER in {path.name for path in folders[0].iterdir()}


@pytest.mark.slow
def test_a_run_that_is_not_observed_keeps_nothing(tmp_path):
    config = small_config(**{"privacy.observe": False})
    assert run_alone(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {observed.FOLDER, observed.EXPOSED}
    assert fedmoe_jax.load_run(tmp_path / "run").observed is None
