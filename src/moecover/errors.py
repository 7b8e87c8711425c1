"""Errors that end a command with one line instead of a traceback.

A message says what is wrong, where, what was found, what is allowed and how to fix it. It names arguments by `arg`:
in Python they read ``protect=1.5``, on the command line ``--protect 1.5``.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Self

MARK = "\x1f"  # around an argument's name within a message
FLAG_OF = {  # flags that are not spelled like the argument
    "calibration": "corpus",
    "corpora": "corpus",
    "evaluations": "evaluation",
    "files": "file",
    "keeps": "keep",
    "kind": "repair",
    "merges": "merge",
    "methods": "method",
    "options": "option",
    "plugins": "plugin",
    "repairs": "repair",
    "retains": "retain",
    "saliencies": "saliency",
    "texts": "perplexity",
    "top_ks": "top-k",
    "weights": "weight",
}
_ARGUMENT = re.compile(f"{MARK}(\\w+)(?:=([^{MARK}]*))?{MARK}")
LONG_WORD = 60  # characters of a path or name that is left whole in a message that is too long
LONGEST = 440  # characters of a message: with the program's name before it, one line of less than 500


def printable(text: str, *, lines: bool = False) -> str:
    """Text as a terminal or a log can show it: control, format and unassigned characters are escaped, spaces are plain.

    Args:
        text: may come from a file.
        lines: line feeds stay.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if character in "\t\n\r\v\f" or unicodedata.category(character) in ("Zs", "Zl", "Zp"):
        return " "
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text of at most so many characters: in a longer one, long words (paths, names) and then the middle are cut."""
    if len(text) > longest:
        text = " ".join(
            f"{word[:12]}...{word[15 - LONG_WORD :]}" if len(word) > LONG_WORD else word for word in text.split(" ")
        )
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def arg(name: str, value: object = None) -> str:
    """An argument for use in an error message, as in ``f"{arg('batch_size', 0)} is out of range: 1 or more"``.

    Args:
        name: the name in Python.
        value: the value that was given; None names the argument alone.
    """
    return f"{MARK}{name}{'' if value is None else f'={value}'.replace(MARK, '')}{MARK}"


def flag(name: str) -> str:
    """The command-line flag of an argument."""
    return f"--{FLAG_OF.get(name, name).replace('_', '-')}"


class MoecoverError(Exception):
    """The job could not be finished, or a check failed (exit status 1).

    A message is one printable line of bounded length, whatever the names and texts from files that it quotes.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        self.message = message  # arguments are marked
        text = _ARGUMENT.sub(lambda m: m[1] if m[2] is None else f"{m[1]}={m[2]}", message)
        super().__init__(shortened(printable(text)))

    @property
    def for_command_line(self) -> str:
        """The message with command-line flags instead of Python arguments."""
        text = _ARGUMENT.sub(lambda m: flag(m[1]) if m[2] is None else f"{flag(m[1])} {m[2]}", self.message)
        return shortened(printable(text))

    def extended(self, sentence: str) -> Self:
        """The same error with one more sentence."""
        return type(self)(f"{self.message}. {sentence}")


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has panicked; its Python classes for that are no Exceptions and have no common base."""
    return type(error).__name__ == "PanicException"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error from Python or torch means that CPU or GPU memory ran out."""
    if not isinstance(error, (RuntimeError, OSError)):
        return isinstance(error, MemoryError)
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


class InputError(MoecoverError, ValueError):
    """The request or its input is not usable as given (exit status 2)."""

    exit_code = 2
