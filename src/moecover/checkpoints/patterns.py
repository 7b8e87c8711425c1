"""Patterns over module names, as quantisation settings write them: reads their text, says what they match.

A text is a regular expression after ``re:`` (compressed-tensors), ``+:`` or ``-:`` (GPTQModel) and where it has
characters that only regular expressions use; these match from the beginning of a name. Any other text with ``*``, ``?``
or ``[`` is a shell pattern for the whole name. All else is a name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import regex

from moecover.errors import InputError

SECONDS = 2  # for one name: a pattern can be such that matching takes for ever
PREFIXES = ("re:", "+:", "-:")
REGEX_ONLY = re.compile(r"[\\()|^$+{]|^\.\*")
WILD = re.compile(r"[*?\[]")
LITERAL = re.compile(r"[\w./:\-]*")
SEGMENT = re.compile(r"(?<!\w)experts(?:\\?\.)")  # what precedes the number of an expert


@dataclass(frozen=True)
class Pattern:
    """A pattern over module names.

    Attributes:
        prefix: one of `PREFIXES`, or empty.
        body: the text behind it.
        regex: whether it is a regular expression; else a shell pattern.
    """

    prefix: str
    body: str
    regex: bool

    @property
    def text(self) -> str:
        """The pattern as it is written in settings."""
        return self.prefix + self.body

    def matcher(self) -> Callable[[str], object]:
        """The function that gives a true value for the names that match.

        Raises:
            regex.error: it is no valid regular expression.
        """
        return _matching(self.body if self.regex else fnmatch.translate(self.body))

    def with_body(self, body: str) -> Pattern:
        """The same kind of pattern with another text."""
        return Pattern(self.prefix, body, self.regex)


def any_of(patterns: Iterable[Pattern]) -> Callable[[str], object]:
    """The function that gives a true value for the names that one of several patterns matches."""
    bodies = (one.body if one.regex else fnmatch.translate(one.body) for one in patterns)
    return _matching("|".join(f"(?:{body})" for body in bodies))


def _matching(body: str) -> Callable[[str], object]:
    """The function that matches a regular expression; it comes from a file, so its time is bounded."""
    compiled = regex.compile(body)

    def matches(name: str) -> object:
        try:
            return compiled.match(name, timeout=SECONDS)
        except TimeoutError:
            raise InputError(
                f"the pattern {body!r} of the quantisation settings takes longer than {SECONDS} s on {name}: write it "
                "in a simpler way"
            ) from None

    return matches


def split_prefix(text: str) -> tuple[str, str]:
    """The prefix that marks a text as a regular expression, empty for none, and the rest."""
    prefix = next((p for p in PREFIXES if text.startswith(p)), "")
    return prefix, text[len(prefix) :]


def pattern_of(text: str) -> Pattern | None:
    """The pattern in a text; None if the text is a name, with or without escaped dots and anchors.

    A marked regular expression that ends in an expert's number is a pattern: it also matches longer numbers.
    """
    prefix, body = split_prefix(text)
    bare = body.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if LITERAL.fullmatch(bare):
        return Pattern(prefix, body, True) if prefix and re.search(r"experts\.\d+$", bare) and body[-1] != "$" else None
    if prefix or REGEX_ONLY.search(body):
        return Pattern(prefix, body, True)
    return Pattern(prefix, body, False) if WILD.search(body) else None


def expert_segment(pattern: Pattern) -> tuple[int, int] | None:
    """Where in the text of a pattern the number of an expert stands, as what matches it; None if nowhere or twice."""
    found = list(SEGMENT.finditer(pattern.body))
    if len(found) != 1:
        return None
    start = end = found[0].end()
    body, depth = pattern.body, 0
    while end < len(body):
        rest = body[end:]
        if depth == 0 and (rest.startswith("\\.") or (rest[0] == "." and not re.match(r"\.[*+?{]", rest))):
            break
        if depth == 0 and pattern.regex and rest[0] in "$)|":
            break
        depth += (rest[0] in "([") - (rest[0] in ")]")
        end += 2 if rest[0] == "\\" else 1
    return (start, min(end, len(body))) if end > start else None


def substituted(pattern: Pattern, ids: Iterable[int]) -> list[list[Pattern]]:
    """Ways to write a pattern for other experts, the shortest first; none has been checked.

    Args:
        pattern: that matches some experts, the same ones in every layer that it matches.
        ids: the experts that the result is to match in these layers.
    """
    numbers = [str(i) for i in sorted(ids)]
    if not numbers or (place := expert_segment(pattern)) is None:
        return []
    before, segment, after = pattern.body[: place[0]], pattern.body[place[0] : place[1]], pattern.body[place[1] :]
    tail = re.sub(r"^\d+", "", segment) if segment[0].isdigit() else segment
    if pattern.regex:
        one = numbers[0] if not numbers[1:] else f"(?:{'|'.join(numbers)})"
        rest = ["", r"(?![0-9])"] if not re.fullmatch(r"\d+(\.\*)", segment) else [tail, "", r"(?![0-9])"]
        return [[pattern.with_body(before + one + more + after)] for more in rest]
    ways = [[pattern.with_body(before + n + tail + after) for n in numbers]] if segment[0].isdigit() else []
    ways.append([pattern.with_body(before + n + after) for n in numbers])
    if not after:
        ways.append([pattern.with_body(f"{before}{n}{more}") for n in numbers for more in ("", ".*")])
    return ways
