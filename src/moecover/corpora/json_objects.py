"""Objects in a JSON text: reads its parts, yields each object of a list, or one after the other, once it is whole.

So a list of a hundred gigabytes takes no more memory than its largest object.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator

from moecover.errors import InputError
from moecover.files.reading import MAX_JSON_BYTES

CUT_OFF = 12  # characters at the end of a text that is not whole within which it may stop being JSON
BLANK = " \t\r\n"


class _Text:
    """A text that is read as it is looked at."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts, self._text, self._at = iter(parts), "", 0

    def next(self, skipped: str) -> str:
        """The next character that is not to be skipped; empty at the end."""
        while True:
            while self._at < len(self._text):
                if (character := self._text[self._at]) not in skipped:
                    return character
                self._at += 1
            if not self._longer():
                return ""

    def skip(self) -> None:
        """Pass over one character."""
        self._at += 1

    def value(self) -> object:
        """The value that begins here.

        Raises:
            ValueError: it is not JSON, or too large.
        """
        while True:
            try:
                value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
                return value
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                whole = not error.msg.startswith("Unterminated string") and error.pos < len(self._text) - CUT_OFF
                if whole or not self._longer():
                    raise ValueError(error.msg) from None
            if len(self._text) > MAX_JSON_BYTES:
                raise ValueError(f"an object of more than {MAX_JSON_BYTES} characters")

    def _longer(self) -> bool:
        """Read at least as much again as is left; False at the end."""
        left = self._text[self._at :]
        found = list[str]()
        while sum(map(len, found)) <= len(left) and (part := next(self._parts, "")):
            found.append(part)
        self._text, self._at = left + "".join(found), 0
        return bool(found)


def objects(parts: Iterable[str], where: str) -> Iterator[dict[str, object]]:
    """Yield the objects of a JSON text: those of a list, or one after the other.

    Args:
        parts: the text in any parts, none empty.
        where: what messages call it.

    Raises:
        InputError: it is not JSON, or holds something else than objects; with the number of the row, from 1.
    """
    text = _Text(parts)
    if listed := text.next(BLANK) == "[":
        text.skip()
    for number in itertools.count(1):
        character = text.next(BLANK + "," if listed else BLANK)
        if listed and character == "]":
            return
        if not character and not listed:
            return
        if not character:
            raise InputError(f"{where}: the list of rows has no end after row {number - 1}")
        try:
            value = text.value()
        except ValueError as error:
            raise InputError(f"{where}, row {number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise InputError(f"{where}, row {number}: it must be a JSON object; a file is a list of them")
        yield value
