"""The page and the help of all fields come from the tables that check them."""

from pathlib import Path

from fedmoe_jax.config import list_fields, list_options, make_page, validate
from fedmoe_jax.configs import default
from fedmoe_jax.options import HOST, STATIC, TRACED
from fedmoe_jax.runtime.files import flatten

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_tables_give():
    assert (ROOT / "docs" / "config.md").read_text() == make_page()


def test_every_field_has_a_default_and_an_option():
    config = default.get_config()
    validate(config)
    assert flatten(config.to_dict()).keys() == list_options().keys()


def test_list_fields_describes_each_field_once():
    fields = list_fields()
    assert len({field.name for field in fields}) == len(fields) > 100
    groups = [field.group for field in fields]
    assert groups == sorted(groups, key=groups.index)  # each group in one piece
    for field in fields:
        assert field.scope in (HOST, STATIC, TRACED)
        assert len(field.about) > 10 and "|" not in field.about


def test_a_default_stands_nowhere_but_in_the_default_config():
    assert all(option.default is None for option in list_options().values())
