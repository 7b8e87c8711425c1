"""The tokenizer of a GGUF model: reads texts and chats, gives token ids as llama.cpp makes them.

It has what `corpora` uses of a tokenizer of transformers, under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moecover.errors import MoecoverError
from moecover.llama.model import Model

NO_VOCABULARY = 0  # of `enum llama_vocab_type`


class GgufTokenizer:
    """A tokenizer; usable as long as its model is open.

    Args:
        model: from `model.opened`.
        chat_template: the file's, Jinja; None where it has none.
    """

    def __init__(self, model: Model, chat_template: str | None) -> None:
        self._model, self._template = model, chat_template
        lib = model.library.lib
        self.bos_token_id = _existing(lib.llama_vocab_bos(model.vocabulary))
        self.eos_token_id = _existing(lib.llama_vocab_eos(model.vocabulary))

    def __len__(self) -> int:
        return self._model.vocabulary_size

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        verbose: bool = False,
    ) -> dict[str, Any]:
        """Token ids of texts.

        Args:
            texts: one, or several.
            add_special_tokens: with what the tokenizer puts around a text.
            split_special_tokens: text that spells a special token is text.
            verbose: without effect.

        Returns:
            ``input_ids``: a list, or a list for each text.
        """
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts, add_special_tokens, not split_special_tokens)}
        return {"input_ids": [self._ids(text, add_special_tokens, not split_special_tokens) for text in texts]}

    def _ids(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        library, raw = self._model.library, text.encode()
        room = len(raw) + 8
        ids: Any = library.ffi.new("int32_t[]", room)
        count = library.lib.llama_tokenize(self._model.vocabulary, raw, len(raw), ids, room, add_special, parse_special)
        if count < 0:
            raise MoecoverError(f"llama.cpp makes {-count} tokens of {len(raw)} bytes of text: please report this")
        return list(library.ffi.unpack(ids, count)) if count else []

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that stand for no text."""
        lib = self._model.library.lib
        return [token for token in range(len(self)) if lib.llama_vocab_is_control(self._model.vocabulary, token)]

    @property
    def added_tokens_decoder(self) -> dict[int, str]:
        """Tokens beside the vocabulary: a GGUF file has none."""
        return {}

    def get_vocab(self) -> dict[str, int]:
        """Every token's text with its id; of equal texts the last."""
        library = self._model.library
        texts = (library.lib.llama_vocab_get_text(self._model.vocabulary, token) for token in range(len(self)))
        return {library.ffi.string(text).decode(errors="backslashreplace"): i for i, text in enumerate(texts)}

    def _text(self, token: int | None) -> str:
        library = self._model.library
        if token is None:
            return ""
        raw: bytes = library.ffi.string(library.lib.llama_vocab_get_text(self._model.vocabulary, token))
        return raw.decode(errors="replace")

    def get_chat_template(self, *, tools: object = None) -> str:
        """The file's chat template.

        Raises:
            ValueError: it has none.
        """
        if self._template is None:
            raise ValueError("the file has no tokenizer.chat_template")
        return self._template

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text that a template makes of messages, as transformers renders it.

        Raises:
            ValueError: there is no template.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        made, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=chat_template or self.get_chat_template(),
            add_generation_prompt=add_generation_prompt,
            bos_token=self._text(self.bos_token_id),
            eos_token=self._text(self.eos_token_id),
        )
        return str(made[0])


def _existing(token: int) -> int | None:
    return int(token) if token >= 0 else None


def tokenizer_of(model: Model, chat_template: str | None) -> GgufTokenizer | None:
    """The tokenizer of a model; None where its file has no vocabulary."""
    kind = model.library.lib.llama_vocab_type(model.vocabulary)
    return None if kind == NO_VOCABULARY else GgufTokenizer(model, chat_template)
