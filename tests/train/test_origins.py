"""The origins of a run's rounds: one for each process, first rounds by hand."""

import json

import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.train.origins import (
    ORIGINS,
    read_origins,
    record_origin,
    summarise_origins,
)

FAST = {"commit": "a1", "xla_flags": "--xla_cpu_enable_fast_math=true"}
SLOW = {"commit": "a1", "xla_flags": ""}


def test_record_origin_keeps_those_of_earlier_rounds(tmp_path):
    assert record_origin(tmp_path, 0, FAST) == set()
    assert record_origin(tmp_path, 4, SLOW) == {"xla_flags"}
    assert record_origin(tmp_path, 6, SLOW) == set()  # as the one before
    assert record_origin(tmp_path, 8, FAST | {"commit": "b2"}) == {"xla_flags"}
    expected = [(1, FAST), (5, SLOW), (9, FAST | {"commit": "b2"})]
    assert read_origins(tmp_path) == expected
    summary = summarise_origins(tmp_path)
    assert summary["made_by"] == FAST | {"commit": "b2"}
    assert [each["first_round"] for each in summary["origins"]] == [1, 5, 9]


def test_record_origin_drops_those_of_lost_rounds(tmp_path):
    record_origin(tmp_path, 0, SLOW)
    record_origin(tmp_path, 4, FAST)
    record_origin(tmp_path, 4, SLOW)  # FAST was killed before its first checkpoint
    assert read_origins(tmp_path) == [(1, SLOW)]
    record_origin(tmp_path, 0, FAST)
    assert read_origins(tmp_path) == [(1, FAST)]


def test_record_origin_of_rounds_before_origins_were_kept(tmp_path):
    assert read_origins(tmp_path) == []
    assert summarise_origins(tmp_path)["made_by"] == {}
    record_origin(tmp_path, 4, FAST)
    assert read_origins(tmp_path) == [(1, {}), (5, FAST)]


def test_read_origins_refuses_another_commit_than_was_written(tmp_path):
    record_origin(tmp_path, 0, FAST)
    path = tmp_path / ORIGINS
    path.write_text(path.read_text().replace("a1", "a3"))
    with pytest.raises(UserError, match="origins.json is damaged; allowed"):
        read_origins(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"origins": [{"made_by": {}}]}'])
def test_read_origins_refuses_a_damaged_file(tmp_path, text):
    (tmp_path / ORIGINS).write_text(text)
    with pytest.raises(UserError, match="origins.json is damaged; allowed"):
        record_origin(tmp_path, 2, FAST)
    record_origin(tmp_path, 0, FAST)  # which begins anew
    assert json.loads((tmp_path / ORIGINS).read_text())["origins"][0]["made_by"] == FAST
