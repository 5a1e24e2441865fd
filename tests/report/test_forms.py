"""Forms of a run's files: whole ones pass, others are one line with file and field."""

from pathlib import Path

import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.report import forms

from .fake_runs import ARRAYS, CONFIG, ROWS

PATH = Path("run/file")


def test_what_a_run_writes_passes():
    forms.check_fields(CONFIG, forms.CONFIG, PATH)
    forms.check_rows(ROWS, PATH)
    forms.check_arrays(ARRAYS, PATH)
    forms.check_codes(ARRAYS, CONFIG, PATH)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (3, ()),
        (None, ()),
        ([1, 2.5, None], (3,)),
        ([], (0,)),
        ([[1, 2], [3, 4], [5, 6]], (3, 2)),
        ([[1, 2], [3]], None),
        ([1, [2]], None),
        (["x"], None),
        ({"a": 1}, None),
    ],
)
def test_find_shape_by_hand(value, shape):
    assert forms.find_shape(value) == shape


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"a": 3}, "run/file is damaged: a=3; allowed: an object"),
        ({"a": {}}, "run/file has no a.b; allowed: a list of text"),
        ({"a": {"b": [3]}}, r"run/file is damaged: a.b=\[3\]; allowed: a list of text"),
        ({"a": {"b": []}, "c": True}, "c=True; allowed: a whole number from 0"),
    ],
)
def test_check_fields_names_field_value_and_what_is_allowed(tree, told):
    needed = {"a.b": forms.TEXTS, "c": forms.COUNT._replace(needed=False)}
    with pytest.raises(UserError, match=told):
        forms.check_fields(tree, needed, PATH)


def test_rows_have_one_shape():
    rows = [{"round": 1, "own": None}, {"round": 2, "own": [1]}]
    forms.check_rows(rows, PATH)
    with pytest.raises(UserError, match=r"own=\[1, 2\] of round 3"):
        forms.check_rows([*rows, {"round": 3, "own": [1, 2]}], PATH)


def test_numbers_of_layers_are_lists():
    forms.check_rows([{"round": 1, "layer_load_cv": [0.5, None]}], PATH)
    for value in (0.5, [[0.5, 0.5]]):
        with pytest.raises(UserError, match="layer_load_cv=.* of round 1; allowed"):
            forms.check_rows([{"round": 1, "layer_load_cv": value}], PATH)


def test_arrays_of_a_central_run_have_one_device():
    devices = {name: ARRAYS[name][:1] for name in ("capacity", "tier", "belief")}
    devices |= {"participation": np.ones(1, int), "fitness": np.ones((1, 2))}
    arrays = ARRAYS | devices | {"times_held": np.ones((1, 2), int)}
    forms.check_arrays(arrays, PATH)
    with pytest.raises(UserError, match=r"times_held is int64\[3, 2\]"):
        forms.check_arrays(arrays | {"times_held": np.ones((3, 2), int)}, PATH)


def test_codes_have_names():
    with pytest.raises(UserError, match="last_code has others than 0 to 7"):
        forms.check_codes(ARRAYS | {"last_code": np.array([8])}, CONFIG, PATH)
    older = {name: v for name, v in ARRAYS.items() if name != "tier_names"}
    forms.check_codes(older, CONFIG, PATH)  # the config has them


def test_groups_divide_the_strata():
    forms.check_arrays(ARRAYS | {"group_names": np.array(["one", "two"])}, PATH)
    for names in (np.array(["one", "two", "three"]), np.zeros(0, "U1")):
        with pytest.raises(UserError, match="2 strata of . groups; restore it"):
            forms.check_arrays(ARRAYS | {"group_names": names}, PATH)
