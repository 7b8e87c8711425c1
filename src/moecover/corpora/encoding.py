"""Documents to token ids: texts as the tokenizer has them, chats through its chat template.

A text is followed by the tokenizer's end-of-text token, and what looks like a special token in it is text. A chat is
what its template writes and nothing else: that has its own marks, a BOS token where the template writes one included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moecover.corpora.forms import Chat, Document
from moecover.errors import InputError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "0c9b1f"  # in a message of parts; a template that does not know parts writes their keys too
REASON_CHARS, ROWS_NAMED = 200, 8


class Encoder:
    """Token ids of documents, and what has to be recorded of how they were made."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        *,
        chat_template: str | None = None,
        parse_special: bool = False,
    ) -> None:
        """Make an encoder.

        Args:
            tokenizer: of the model.
            where: what messages call the source of the documents.
            chat_template: instead of the tokenizer's: Jinja.
            parse_special: whether text that spells a special token is that token.
        """
        self.tokenizer, self.where, self.parse_special = tokenizer, where, parse_special
        self.end: int | None = tokenizer.eos_token_id
        self._given, self._template, self._takes_parts = chat_template, "", False
        self._chats, self._refused, self._reason = 0, list[int](), ""

    def ids(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of every document, in order; of a chat that the template refuses none.

        Raises:
            InputError: there are chats and no template, or one that is not Jinja.
        """
        rendered = [self._rendered(one) if isinstance(one, Chat) else one for one in documents]
        texts = [one for one in rendered if one is not None]
        if not texts:
            return []
        if documents and isinstance(documents[0], Chat):
            return self._tokenized(texts, parse_special=True)
        end = [] if self.end is None else [self.end]
        return [[*ids, *end] for ids in self._tokenized(texts, parse_special=self.parse_special)]

    def begun(self, text: str) -> list[int]:
        """Token ids of the beginning of a text, without an end-of-text token."""
        return self._tokenized([text], parse_special=self.parse_special)[0]

    def record(self) -> dict[str, Any]:
        """Entries for the record of a corpus: how documents end, the template and what it refused."""
        if not self._chats:
            facts: dict[str, Any] = {} if self.end is None else {"eos": [self.end]}
            return {**facts, **({"parse_special": True} if self.parse_special else {})}
        facts = {"chat_template": hashlib.sha256(self._template.encode()).hexdigest()}
        if self._refused:
            facts["refused"] = {
                "count": len(self._refused),
                "of": self._chats,
                "rows": sorted(self._refused)[:ROWS_NAMED],
                "reason": self._reason,
            }
        return facts

    def check(self) -> None:
        """Refuse a corpus of which the template took no row.

        Raises:
            InputError: with the first reason.
        """
        if self._chats and len(self._refused) == self._chats:
            raise InputError(
                f"{self.where}: the chat template refuses every row, row {self._refused[0]} because: {self._reason}"
            )

    def _tokenized(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        whole = [text.encode("utf-8", "replace").decode() for text in texts]  # lone surrogates have no bytes
        found: list[list[int]] = self.tokenizer(
            whole, add_special_tokens=False, split_special_tokens=not parse_special, verbose=False
        )["input_ids"]
        return found

    def _rendered(self, chat: Chat) -> str | None:
        """What the template makes of a chat; None where it refuses it, which is counted."""
        if not self._chats:
            self._prepare(chat)
        self._chats += 1
        try:
            return self._apply(self._plain(chat.messages), chat.tools)
        except Exception as error:  # a template is a program: it may fail in any way
            self._refused.append(chat.row)
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            self._reason = self._reason or shortened(reason, REASON_CHARS)
            return None

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        made = self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._given, tokenize=False, add_generation_prompt=False
        )
        return str(made)

    def _prepare(self, chat: Chat) -> None:
        """Find the template, and whether it takes messages of parts.

        Raises:
            InputError: there is none, or it is not Jinja.
        """
        import jinja2

        try:
            self._template = self._given or self.tokenizer.get_chat_template(tools=chat.tools)
        except ValueError:
            raise InputError(
                f"{self.where} holds chats, and the model's tokenizer has no chat template. Give one with "
                "--chat-template FILE (chat_template=FILE), or the key of a text with --text-field KEY (text=KEY)"
            ) from None
        part = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
        try:
            made = self._apply(part, None)
            self._takes_parts = PROBE in made and not any(f"{mark}text{mark}" in made for mark in "'\"")
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self.where}: the chat template is not Jinja: line {error.lineno}: {error}") from None
        except Exception:  # a template that takes texts only
            self._takes_parts = False

    def _plain(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose parts are joined to a text where the template takes no parts.

        Raises:
            ValueError: a part is no text.
        """
        found = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):
                texts = [_text_of(part) for part in content]
                message = message if self._takes_parts else {**message, "content": "\n".join(texts)}
            found.append(message)
        return found


def _text_of(part: object) -> str:
    """The text of a part.

    Raises:
        ValueError: it is a picture or something else.
    """
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"a part of a message is {kind}, and text alone is calibrated on")
