"""The models that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from moecover.errors import InputError
from moecover.registry import unknown_name

DEFAULT = "qwen2-moe-tiny"
IN_SOURCE = ("deepseek-moe-tiny",)  # not in the wheel, which they would make twice as large
SHIPPED = "shipped:"  # before the name of a model that comes with the package


def where_is(model: str) -> str | Path:
    """The folder of ``shipped:NAME``; any other model as it is.

    Raises:
        InputError: there is no shipped model of this name.
    """
    return shipped_model(model.removeprefix(SHIPPED)) if model.startswith(SHIPPED) else model


def shipped_model(name: str = DEFAULT) -> Path:
    """The folder of a model that comes with the package.

    Raises:
        InputError: there is none of this name.
    """
    models = Path(str(resources.files("moecover") / "assets" / "models"))
    if name in IN_SOURCE and not (models / name).is_dir():
        raise InputError(f"shipped model {name} comes with the source, not with the wheel. Use {DEFAULT}, or a clone")
    if name not in (known := sorted(p.name for p in models.iterdir())):
        raise unknown_name("shipped model", name, known)
    return models / name
