"""Forms of rows: reads a row's keys, returns the document that it holds, a text or a chat.

A form is one entry of `FORMS`. The first of the table whose keys a row has is the row's form, so a row that holds a
chat and a rendering of it is read as the chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moecover.errors import InputError
from moecover.registry import unknown_name

Row = dict[str, object]

ROLES = {  # of ShareGPT's `from`
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
KEYS_SHOWN = 12  # of a row, in a message


@dataclass(frozen=True)
class Chat:
    """Messages for a chat template.

    Attributes:
        messages: each with a ``role``, and ``content`` (a text or a list of parts) or tool calls.
        tools: JSON schemas of the tools that the model may call.
        row: number of the row that it was, from 1.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    row: int = 0

    def size(self) -> int:
        """Characters, about."""
        return len(str(self.messages)) + len(str(self.tools or ""))


Document = str | Chat


class FileRow(dict[str, object]):
    """A row of one of several files, which messages name.

    Attributes:
        file: within their folder.
        number: of the row in it, from 1.
    """

    def __init__(self, row: Row, file: str, number: int) -> None:
        super().__init__(row)
        self.file, self.number = file, number


def place_of(row: Row, where: str, number: int) -> str:
    """What messages call a row; ``where`` is its source, ``number`` its number among all of its rows, from 1."""
    return f"{where}/{row.file}, row {row.number}" if isinstance(row, FileRow) else f"{where}, row {number}"


class BadRow(Exception):
    """A row that is not what its keys say."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"`{key}` {reason}")


class Form(NamedTuple):
    """A form of rows.

    Attributes:
        keys: a row of this form has all of them, none null.
        also: keys that it may have.
        summary: what they hold, for the documentation.
        document: the document of a row.
    """

    keys: tuple[str, ...]
    also: tuple[str, ...]
    summary: str
    document: Callable[[Row], Document]

    @property
    def name(self) -> str:
        return ", ".join(self.keys)


# ------------------------------------------------------------------------------------------------- what the keys hold
def _text(row: Mapping[str, object], key: str) -> str:
    if not isinstance(value := row[key], str):
        raise BadRow(key, f"holds {_kind(value)}, it must be text")
    return value


def _more(row: Row, key: str) -> str:
    """A text that may be missing."""
    return _text(row, key) if row.get(key) is not None else ""


def _listed(row: Row, key: str) -> list[dict[str, Any]]:
    """A list of objects; data sets of flat columns have it as JSON text."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(key, f"is text that is not JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadRow(key, f"holds {_kind(value)}, it must be a list of objects")
    return value


def _tools(row: Row) -> list[Any] | None:
    return _listed(row, "tools") or None if row.get("tools") is not None and row["tools"] != "" else None


def _kind(value: object) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _turns(row: Row, key: str) -> list[dict[str, Any]]:
    """Messages with roles."""
    found = _listed(row, key)
    for number, message in enumerate(found, 1):
        if not isinstance(message.get("role"), str):
            raise BadRow(key, f"has no `role` in message {number} (keys: {_keys(message)})")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise BadRow(key, f"holds {_kind(message['content'])} as `content` of message {number}, it must be text")
    return found


def _messages(row: Row, key: str = "messages") -> Chat:
    return Chat(_turns(row, key), _tools(row))


def _conversations(row: Row, key: str = "conversations") -> Chat:
    """ShareGPT's turns ``{"from": ..., "value": ...}``, and sets that have messages under its key."""
    found = _listed(row, key)
    if found and "role" in found[0]:
        return _messages(row, key)
    turns = [_said("system", system)] if (system := _more(row, "system")) else []
    for number, turn in enumerate(found, 1):
        role = turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(key, f"has the `from` {role!r} in turn {number}. Known: {', '.join(ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise BadRow(key, f"has no text as `value` of turn {number}")
        turns.append(_said(ROLES[role], turn["value"]))
    return Chat(turns, _tools(row))


def _completion(row: Row) -> Chat:
    """A prompt and what follows it: texts, or messages."""
    turns: list[dict[str, Any]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        turns += _turns(row, key) if isinstance(row[key], list) else [_said(role, _text(row, key))]
    return Chat(turns, _tools(row))


def _instruction(row: Row) -> Chat:
    """An instruction, what it is about (Alpaca's ``input``), and the answer."""
    asked = "\n\n".join(filter(None, (_text(row, "instruction"), _more(row, "input"))))
    system = [_said("system", text)] if (text := _more(row, "system")) else []
    return Chat([*system, _said("user", asked), _said("assistant", _text(row, "output"))])


FORMS = (
    Form(("messages",), ("tools",), "messages of `role` and `content`, as OpenAI's and the hub's chats", _messages),
    Form(("conversations",), ("system", "tools"), "ShareGPT: turns of `from` and `value`", _conversations),
    Form(("prompt", "completion"), ("tools",), "a question and its answer: texts, or messages", _completion),
    Form(("instruction", "output"), ("input", "system"), "Alpaca: an instruction and its answer", _instruction),
    Form(("text",), (), "one document", lambda row: _text(row, "text")),
    Form(("content",), (), "one document, as sets of source code have it", lambda row: _text(row, "content")),
)
IDS = ("input_ids", "attention_mask")
COLUMNS = tuple(dict.fromkeys([*IDS, *(key for form in FORMS for key in (*form.keys, *form.also))]))


# ------------------------------------------------------------------------------------------------------------ reading
def documents(rows: Iterable[Row], where: str, field: str | None = None) -> Iterator[Document]:
    """Yield the document of every row; all have the form of the first.

    Args:
        rows: from a file or a data set.
        where: what the error message calls their source.
        field: the key that holds the text (or the messages), whatever other keys there are.

    Raises:
        InputError: a row of no known form, of another form than the first, or whose keys hold something else; with the
            number of the row, from 1.
    """
    form: Form | None = None
    for number, row in enumerate(rows, 1):
        place = place_of(row, where, number)
        if form is None:
            form = _by_field(row, place, field) if field is not None else _form_of(row, place)
        if lacking := [key for key in form.keys if row.get(key) is None]:
            raise InputError(f"{place} has no `{lacking[0]}`; rows with and without it do not mix")
        try:
            document = form.document(row)
        except BadRow as error:
            raise InputError(f"{place}: {error}") from None
        yield replace(document, row=number) if isinstance(document, Chat) else document


def _form_of(row: Row, place: str) -> Form:
    """The form of a row, by its keys."""
    for form in FORMS:
        if all(row.get(key) is not None for key in form.keys):
            return form
    if row.get("input_ids") is not None:
        raise InputError(f"{place} holds token ids (`input_ids`), and text is needed here")
    if null := [key for form in FORMS if all(key in row for key in form.keys) for key in form.keys if row[key] is None]:
        raise InputError(f"{place}: `{null[0]}` is null. Leave out rows without text, or name another key (text=KEY)")
    known = "; ".join(form.name for form in FORMS)
    raise InputError(
        f"{place}: no known form has its keys ({_keys(row)}). Name the one that holds the text (text=KEY), or give one "
        f"of: {known}"
    )


def _by_field(row: Row, place: str, field: str) -> Form:
    """The form of rows whose text, or messages, are under a key that was named."""
    if field not in row:
        raise InputError(f"{place}: {unknown_name('field', field, row)}")

    def document(row: Row) -> Document:
        if not isinstance(row[field], list):
            return _text(row, field)
        turns = _listed(row, field)
        return _conversations(row, field) if turns and "from" in turns[0] else _messages(row, field)

    return Form((field,), (), "", document)


def _keys(row: Mapping[str, object]) -> str:
    shown = [str(key) for key in row][:KEYS_SHOWN]
    return ", ".join(shown) + (" ..." if len(row) > KEYS_SHOWN else "") if shown else "none"
