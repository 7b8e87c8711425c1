"""A table from names to decorated functions, with "did you mean" for a name that is not in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from moecover.errors import InputError

F = TypeVar("F", bound=Callable[..., object])


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a table: the closest names, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return InputError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


class Registry(Mapping[str, F], Generic[F]):
    """Functions by name, in the order of their definition; ``paper`` says where the formula comes from."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.papers: dict[str, str] = {}
        self._functions: dict[str, F] = {}

    def __call__(self, name: str, *, paper: str) -> Callable[[F], F]:
        """Decorator that enters a function under ``name``."""

        def enter(function: F) -> F:
            self._functions[name] = function
            self.papers[name] = paper
            return function

        return enter

    def __getitem__(self, name: str) -> F:
        if name not in self._functions:
            raise unknown_name(self.kind, name, self._functions)
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def rows(self) -> list[dict[str, str]]:
        """Name, first line of the docstring and paper of every entry, for listings and docs."""
        return [
            {"name": name, "summary": (f.__doc__ or "").strip().split("\n")[0], "paper": self.papers[name]}
            for name, f in self._functions.items()
        ]
