"""Tables of named entries, with "did you mean" for a name that is unknown, and the plugins that add to them.

A table knows nothing of its entries. It does know which of them come from a plugin (`load_plugin`): built-in entries
are listed first, and a plugin cannot use the name of a built-in one, whichever of the two is entered first.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

from moecover.errors import InputError, MoecoverError, is_out_of_memory, shortened

R = TypeVar("R")
T = TypeVar("T")
P = ParamSpec("P")

LONGEST_NAME = 100  # characters of an unknown name that a message quotes

_plugin: str | None = None  # the plugin that is being imported


class UnknownNameError(InputError, KeyError):
    """A table has no entry of a name; also a KeyError, as mappings raise it, so that ``in`` and ``get`` answer."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError quotes its message


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that a table does not have: the closest names, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:LONGEST_NAME], known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return UnknownNameError(f"unknown {kind} {shortened(repr(name), LONGEST_NAME)}.{hint} Known: {', '.join(known)}")


class Registry(Mapping[str, R], Generic[R]):
    """Entries by name: functions, entered by a decorator, or records of any other type, entered by `add`.

    Iteration gives the built-in entries in the order of their definition, then those of plugins.

    Attributes:
        kind: what an entry is, in messages.
        papers: source of a decorated function, by name.
        facts: other keywords of the decorator, by name.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.papers: dict[str, str] = {}
        self.facts: dict[str, dict[str, bool]] = {}
        self._entries: dict[str, R] = {}
        self._plugin_of: dict[str, str | None] = {}

    def add(self, name: str, record: R) -> None:
        """Enter a record under a name. A built-in entry of the same name is replaced, unless by a plugin.

        Raises:
            InputError: a plugin and a built-in entry, or two plugins, have the same name.
        """
        plugin = current_plugin()
        if name in self._entries and self._plugin_of[name] != plugin:
            raise InputError(
                f"plugin {plugin or self._plugin_of[name]}: {self.kind} {name} exists already. Choose another name"
            )
        self._entries[name], self._plugin_of[name] = record, plugin

    def __call__(self, name: str, *, paper: str, **facts: bool) -> Callable[[R], R]:
        """Decorator that enters a function under ``name``.

        Args:
            name: name of the entry.
            paper: source of the formula or method.
            facts: anything else to be known of the entry.

        Raises:
            InputError: see `add`.
        """

        def enter(function: R) -> R:
            self.add(name, guarded(function, f"{self.kind} {name}"))
            self.papers[name], self.facts[name] = paper, facts
            return function

        return enter

    def __getitem__(self, name: str) -> R:
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries, key=lambda name: self._plugin_of[name] is not None))

    def __len__(self) -> int:
        return len(self._entries)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Remove at the end of the block what was entered within it."""
        kept = dict(self._entries), dict(self._plugin_of), dict(self.papers), dict(self.facts)
        try:
            yield
        finally:
            self._entries, self._plugin_of, self.papers, self.facts = kept

    def rows(self) -> list[dict[str, str]]:
        """Name, first line of the docstring and paper of every decorated function, for listings and docs."""
        return [
            {"name": name, "summary": (entry.__doc__ or "").strip().split("\n")[0], "paper": self.papers[name]}
            for name, entry in self.items()
        ]


# ------------------------------------------------------------------------------------------------------------ plugins
def current_plugin() -> str | None:
    """The plugin whose code runs now while it is being imported; None for modules of this package that it imports."""
    if _plugin is None:
        return None
    frame = sys._getframe()
    while frame.f_code.co_name != "<module>" and frame.f_back is not None:
        frame = frame.f_back  # the innermost module whose body is being executed
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return None if package == __name__.partition(".")[0] else _plugin


def guarded(function: T, what: str) -> T:
    """A plugin's function, wrapped so that any error becomes one line that names its file; others are left as they are.

    Args:
        function: what is being entered; anything that cannot be called is left as it is.
        what: name of the function in messages.
    """
    plugin = current_plugin()
    if plugin is None or not callable(function):
        return function
    return _guarded(function, what, plugin)  # type: ignore[return-value]  # of the same signature


def _guarded(function: Callable[P, T], what: str, plugin: str) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result
                return function(*args, **kwargs)
        except MoecoverError:
            raise
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise _plugin_error(plugin, what, error) from error

    return call


def _plugin_error(plugin: str, what: str, error: Exception | SystemExit) -> InputError:
    try:
        reason = str(error).strip().split("\n")[0]
    except Exception:  # an error class of the plugin's own
        reason = "no message"
    line, trace = "", error.__traceback__
    while trace is not None:  # the last line of the traceback that lies in the user's file
        if trace.tb_frame.f_code.co_filename == plugin:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return InputError(f"plugin {plugin}{line}: {what} raised {type(error).__name__}: {reason}")


def load_plugin(path: str | Path) -> None:
    """Import a user's Python file, whose decorators enter its saliencies and methods.

    Raises:
        InputError: the file does not exist, it raises an error, or it uses a name that is taken.
    """
    global _plugin
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"plugin {path}: no such Python file. Give the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"moecover_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _plugin = str(path)
    try:
        sys.modules[spec.name] = module
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result
            spec.loader.exec_module(module)
    except MoecoverError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise _plugin_error(str(path), "the file", error) from error
    finally:
        _plugin = None
