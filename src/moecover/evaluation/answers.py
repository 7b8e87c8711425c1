"""Answers of a server that are there already: one JSON line each, in ``.OUT.answers.partial`` until OUT is complete.

A job that was stopped or failed goes on with them. A line is found again by a hash of the request, its settings and the
model. The file may be deleted at any time; a line that was not written to its end is not used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moecover.files.atomic import PARTIAL, digest, explained
from moecover.files.reading import parse_json

Answer = tuple[float, bool] | str  # log-likelihood of a continuation, whether it is the most likely one; or text


@contextlib.contextmanager
def kept_answers(output: Path | None) -> Iterator[Answers]:
    """The answers of earlier attempts at an output; new ones are kept until `forget_answers`.

    Args:
        output: the output; None keeps nothing.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.
    """
    if output is None:
        yield Answers()
        return
    path = _place(output)
    with explained(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        known = dict(_read(path)) if path.is_file() else {}
        file = path.open("a", encoding="utf-8")
    answers = Answers(known, file)
    try:
        with file:
            yield answers
    finally:
        if not answers.kept:
            path.unlink()


def forget_answers(output: Path) -> None:
    """Remove the answers that were kept for an output which is complete."""
    _place(output).unlink(missing_ok=True)


def _place(output: Path) -> Path:
    return output.with_name(f".{output.name}.answers{PARTIAL}")


def _read(path: Path) -> Iterator[tuple[str, Answer]]:
    """Key and answer of every whole line."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, answer = parse_json(line)
            if isinstance(answer, list):
                yield str(key), (float(answer[0]), bool(answer[1]))
            elif isinstance(answer, str):
                yield str(key), answer
        except (ValueError, TypeError, IndexError):
            continue


class Answers:
    """Answers by the hash of their request.

    Attributes:
        kept: how many are known, those of earlier attempts included.
    """

    def __init__(self, known: dict[str, Answer] | None = None, file: TextIO | None = None) -> None:
        """Begin with what is known.

        Args:
            known: by key.
            file: takes new answers; None for none.
        """
        self._known, self._file = known or {}, file
        self.kept = len(self._known)

    @staticmethod
    def key(*request: object) -> str:
        """The hash of a request, of JSON values."""
        return digest(list(request))

    def find(self, key: str) -> Answer | None:
        """The answer that is known, None if there is none."""
        return self._known.get(key)

    def keep(self, key: str, answer: Answer) -> None:
        """Keep a new answer.

        Raises:
            MoecoverError: the disk is full or the file cannot be written.
        """
        if self._file is not None:
            with explained(f"writing {self._file.name}", left="What was answered before is kept"):
                self._file.write(f"\n{json.dumps([key, answer])}\n")  # the line before may not have been finished
                self._file.flush()
            self.kept += 1
