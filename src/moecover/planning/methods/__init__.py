"""Selection methods, one module each: every module of this folder is imported here and enters its method.

The modules import numpy and what needs it within their functions: the command line's help reads their options.
"""

from __future__ import annotations

import importlib
import pkgutil

from moecover.planning.method import METHODS, Method
from moecover.planning.options import Option

__all__ = ["METHODS", "baseline_method", "default_method", "options_of_all"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def default_method() -> Method:
    """The method that is used if none is named."""
    return next(method for method in METHODS.values() if method.default)


def baseline_method() -> Method:
    """The method that the others are tested against."""
    return next(method for method in METHODS.values() if method.baseline)


def options_of_all() -> list[tuple[Option, list[str]]]:
    """Every option once, with the names of the methods that have it, in the order of listings."""
    options: dict[str, Option] = {}
    names: dict[str, list[str]] = {}
    for method in METHODS.values():
        for option in method.options:
            options.setdefault(option.name, option)
            names.setdefault(option.name, []).append(method.name)
    return [(option, names[name]) for name, option in options.items()]
