"""Merges, one module each: every module of this folder is imported here and enters its merge.

The modules import numpy and torch within their functions: the command line's help reads their names.
"""

from __future__ import annotations

import importlib
import pkgutil

from moecover.merging.method import MERGES, NONE, Merge
from moecover.registry import unknown_name

__all__ = ["MERGES", "NONE", "merge_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def merge_of(name: str) -> Merge | None:
    """The merge of a name; None for ``none``.

    Raises:
        InputError: it is unknown; says which are known.
    """
    if name == NONE:
        return None
    if name not in MERGES:
        raise unknown_name("merge", name, [NONE, *MERGES])
    return MERGES[name]
