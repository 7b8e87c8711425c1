"""Enters model types that transformers does not have in its Auto classes, at the moment it loads them.

``import moecover`` installs a hook and imports nothing: whoever uses the Auto classes before or after it finds the types,
and a command that needs no model stays quick.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "deepseek" not in CONFIG_MAPPING:  # else the library has its own by now
        from moecover.checkpoints.deepseek.configuration import DeepseekConfig

        CONFIG_MAPPING.register("deepseek", DeepseekConfig)


def _model() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from moecover.checkpoints.deepseek.configuration import DeepseekConfig

    _config()
    if CONFIG_MAPPING["deepseek"] is DeepseekConfig:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )  # fmt: skip

        from moecover.checkpoints.deepseek.modeling import DeepseekForCausalLM

        AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
        mapping = get_checkpoint_conversion_mapping("qwen2_moe")  # the same names on disk and in memory
        register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)


ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _config,
    "transformers.models.auto.modeling_auto": _model,
}


class _Loader(importlib.abc.Loader):
    """Loads a module as ever, then acts."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action()

    def __getattr__(self, name: str) -> object:  # what else is asked of a loader: source, file name
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `ACTIONS` as ever and gives them the loader that acts."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ACTIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, ACTIONS[name])
        return spec


def install() -> None:
    """Install the hook, once; modules that are loaded already are acted on at once."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, action in ACTIONS.items():
        if name in sys.modules:
            action()
