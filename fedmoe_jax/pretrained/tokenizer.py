"""The tokenizer of a pretrained decoder, which cuts text as that has learnt it."""

from pathlib import Path

from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime.folders import resolve_folder


def check_tokenizer(base: str, tokenizer: str) -> None:
    """Refuses another tokenizer than the base's, where its folder has one.

    Args:
      base: `model.base`; a folder without tokenizer.json fits any.
      tokenizer: `data.tokenizer`, empty for bytes.

    Raises:
      UserError: the files differ.
    """
    own = resolve_folder("model.base", base) / "tokenizer.json"
    if not own.is_file():
        return
    given = resolve_folder("data.tokenizer", tokenizer) if tokenizer else Path()
    if not given.is_file() or given.read_bytes() != own.read_bytes():
        raise UserError(
            f"data.tokenizer={show(tokenizer)} is not allowed with model.base="
            f"{show(base)}, whose tokens are others; allowed: {show(str(own))}"
        )
