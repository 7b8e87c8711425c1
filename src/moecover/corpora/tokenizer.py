"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.deepseek.registration import register_deepseek_config
from moecover.checkpoints.remote_code import is_trusted
from moecover.errors import InputError, is_panic
from moecover.signals import held

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint folder, None where there is none.

    Code that comes with it runs only after `trust_remote_code`.

    Raises:
        InputError: there is one, but it cannot be loaded.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / n).is_file() for n in names):
        return None
    with held():
        from transformers import AutoTokenizer

    register_deepseek_config()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=is_trusted(folder))
        tokenizer(["a text"], add_special_tokens=False)  # some settings are looked at only now
        return tokenizer
    except BaseException as error:  # whatever a broken tokenizer makes the library raise
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: the tokenizer could not be loaded: {reason}") from error
