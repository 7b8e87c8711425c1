"""A table from names to decorated functions, with "did you mean" for a name that is not in it."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from moecover.errors import InputError, MoecoverError, is_out_of_memory

F = TypeVar("F", bound=Callable[..., object])

_plugin: str | None = None  # the user's file that is being imported


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a table: the closest names, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return InputError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


class Registry(Mapping[str, F], Generic[F]):
    """Functions by name, in the order of their definition; ``paper`` says where the formula comes from.

    Attributes:
        papers: source by name.
        facts: other keywords of the decorator by name.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.papers: dict[str, str] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._functions: dict[str, F] = {}
        self._plugins: dict[str, str | None] = {}

    def __call__(self, name: str, *, paper: str, **facts: Any) -> Callable[[F], F]:
        """Decorator that enters a function under ``name``.

        Raises:
            InputError: a plugin uses a name that is taken.
        """

        def enter(function: F) -> F:
            if _plugin is not None and name in self._functions and self._plugins.get(name) != _plugin:
                raise InputError(f"plugin {_plugin}: {self.kind} {name} exists already. Choose another name")
            self._functions[name] = function if _plugin is None else _guarded(function, f"{self.kind} {name}", _plugin)
            self.papers[name], self.facts[name], self._plugins[name] = paper, facts, _plugin
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

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A block after which what was entered within it is gone."""
        kept = dict(self._functions), dict(self.papers), dict(self.facts), dict(self._plugins)
        try:
            yield
        finally:
            self._functions, self.papers, self.facts, self._plugins = kept

    def rows(self) -> list[dict[str, str]]:
        """Name, first line of the docstring and paper of every entry, for listings and docs."""
        return [
            {"name": name, "summary": (f.__doc__ or "").strip().split("\n")[0], "paper": self.papers[name]}
            for name, f in self._functions.items()
        ]


def _plugin_error(plugin: str, what: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    line, trace = "", error.__traceback__
    while trace is not None:  # the last line of the traceback that lies in the user's file
        if trace.tb_frame.f_code.co_filename == plugin:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return InputError(f"plugin {plugin}{line}: {what} raised {type(error).__name__}: {reason}")


def _guarded(function: F, what: str, plugin: str) -> F:
    """The function, whatever it raises turned into one line that names its file."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MoecoverError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _plugin_error(plugin, what, error) from error

    return call  # type: ignore[return-value]


def load_plugin(path: str | Path) -> None:
    """Run a user's Python file, whose decorators enter its saliencies and methods.

    Raises:
        InputError: no such file, it raises, or it uses a name that is taken.
    """
    global _plugin
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"plugin {path}: no such Python file. Give the path of a .py file")
    for name in (
        "moecover.planning.saliency",
        "moecover.planning.run",
    ):  # what is built in is there first, so that its names are taken
        importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"moecover_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _plugin = str(path)
    try:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except MoecoverError:
        raise
    except Exception as error:
        raise _plugin_error(str(path), "the file", error) from error
    finally:
        _plugin = None
