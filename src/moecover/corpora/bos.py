"""What a sequence begins with: reads a tokenizer and the option `bos`, gives the ids before the text of every sequence.

Models of some families (Gemma, Llama) were trained with a beginning-of-sequence token before every sequence and compute
something else without it; their tokenizers add it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moecover.errors import InputError, arg

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = ("auto", "always", "never")  # as the tokenizer adds it by itself; its BOS token in any case; nothing


def check_bos(bos: str) -> None:
    """Refuse an unknown value of the option.

    Raises:
        InputError: it is none of `BOS`.
    """
    if bos not in BOS:
        raise InputError(f"{arg('bos', bos)} is unknown. Allowed: {', '.join(BOS)}")


def prefix_of(tokenizer: PreTrainedTokenizerBase, bos: str = "auto") -> tuple[int, ...]:
    """The ids that every sequence begins with; none for most tokenizers.

    Args:
        tokenizer: of the model.
        bos: one of `BOS`.

    Raises:
        InputError: an unknown value, or ``always`` with a tokenizer that has no BOS token.
    """
    check_bos(bos)
    if bos == "never":
        return ()
    added = _added(tokenizer)
    if bos == "auto" or added:
        return added
    if tokenizer.bos_token_id is None:
        raise InputError(f"{arg('bos', bos)}: the tokenizer has no BOS token. Give {arg('bos', 'auto')}")
    return (int(tokenizer.bos_token_id),)


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer puts before a text."""
    alone = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return tuple(whole[:start])
    return ()


def body_length(length: int, prefix: tuple[int, ...]) -> int:
    """Tokens of text in a sequence of ``length`` tokens.

    Raises:
        InputError: there is no room for any.
    """
    if length <= len(prefix):
        raise InputError(
            f"{arg('length', length)} leaves no room for text behind the {len(prefix)} tokens that a sequence begins "
            f"with. Give {arg('length', len(prefix) + 1)} or more"
        )
    return length - len(prefix)


def cut(ids: Sequence[int], length: int, prefix: tuple[int, ...]) -> Iterator[list[int]]:
    """Cut token ids into sequences that begin with the prefix.

    Args:
        ids: of all documents, one after the other. Chats may have the prefix in themselves: where a sequence begins
            with it already, it is not put there a second time.
        length: ids per sequence, those of the prefix included.
        prefix: see `prefix_of`.

    Yields:
        ``length`` ids; the last sequence may be shorter.
    """
    at = 0
    while at < len(ids):
        begin = [] if tuple(ids[at : at + len(prefix)]) == prefix else list(prefix)
        end = at + length - len(begin)
        yield [*begin, *ids[at:end]]
        at = end


def prefix_record(prefix: tuple[int, ...]) -> dict[str, list[int]]:
    """The entry in the record of a corpus; empty where sequences begin with the text itself."""
    return {"bos": list(prefix)} if prefix else {}
