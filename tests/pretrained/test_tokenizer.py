"""Text is cut by the tokenizer of its base, if that has one."""

import pytest
from factories import make_config, train_tokenizer, write_tokenizer

from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.tokenizer import check_tokenizer
from fedmoe_jax.train.plan import load_data


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    write_tokenizer(folder, train_tokenizer("abcd"))
    return folder


def test_the_file_of_the_base_and_its_copies_are_allowed(base, tmp_path):
    check_tokenizer(str(base), str(base / "tokenizer.json"))
    copy = tmp_path / "copy.json"
    copy.write_bytes((base / "tokenizer.json").read_bytes())
    check_tokenizer(str(base), str(copy))


def test_a_base_without_a_tokenizer_allows_any(tmp_path):
    check_tokenizer(str(tmp_path), "")
    check_tokenizer(str(tmp_path), "mine.json")


@pytest.mark.parametrize("name", ["text", "tiny_shakespeare"])
@pytest.mark.parametrize("tokenizer", ["", "other.json", "none.json"])
def test_other_tokens_are_refused_before_text_is_read(name, tokenizer, base, tmp_path):
    write_tokenizer(tmp_path, train_tokenizer("efgh"))
    (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    given = str(tmp_path / tokenizer) if tokenizer else ""
    fields = {"model.kind": "lora", "model.base": str(base), "data.name": name}
    config = make_config(**fields, **{"data.tokenizer": given})
    with pytest.raises(UserError, match=r"^data\.tokenizer=.* tokens are others; allo"):
        load_data(config)


def test_data_that_are_no_text_of_files_have_tokens_of_their_own(base):
    fields = {"model.kind": "lora", "model.base": str(base), "data.name": "markov"}
    load_data(make_config(**fields))
