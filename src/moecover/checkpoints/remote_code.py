"""Code that comes with a checkpoint, run only for a model that its user trusts: reads ``auto_map``, registers classes.

Nothing else in this package runs such code: what `trust_remote_code` registers is found by transformers' Auto classes
as its own classes are. A type that transformers has a class for keeps that class.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from moecover.checkpoints.config_edit import Config
from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.source import is_hub_id
from moecover.errors import InputError, arg, is_out_of_memory, printable
from moecover.files.reading import read_json
from moecover.signals import held

MODELS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
REFERENCE = re.compile(r"\w+\.\w+")  # file.Class
CODE = "auto_map"  # key of config.json and tokenizer_config.json
_folders: set[Path] = set()  # whose code may run
_types: set[str] = set()  # model types whose classes come from a checkpoint


class _Classes(NamedTuple):
    """The classes of a model type, ``file.Class``, and the Auto class that builds its model."""

    configuration: str
    model: str
    auto: str


def is_trusted(folder: Path) -> bool:
    """Whether `trust_remote_code` was called for a folder."""
    return folder.resolve() in _folders


def trust_remote_code(model: str | Path, *, revision: str | None = None) -> list[str]:
    """Run the code that comes with a checkpoint from now on: what any Python program can do, it can do.

    Classes of a model type that transformers does not know are imported and registered in the Auto classes at once; a
    tokenizer's class runs when the tokenizer is loaded. One line on stderr names them.

    Args:
        model: folder or hub id.
        revision: branch, tag or commit of a hub model.

    Returns:
        The classes, ``file.Class``.

    Raises:
        InputError: there is no such code, none that is needed, or it raises an error.
    """
    folder = _folder_of(model, revision)
    config = _json(folder / "config.json")
    family = str(config.get("model_type"))
    with held():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    register_deepseek()
    classes = None if family in CONFIG_MAPPING else _classes(config, model)
    tokenizer = _reference(_json(folder / "tokenizer_config.json"), "AutoTokenizer", model)
    used = [*(classes[:2] if classes else ()), *([tokenizer] if tokenizer else ())]
    if not used and family not in _types:
        raise InputError(
            f"{arg('trust_remote_code')} has no use here: {model} brings no code that is needed, its type {family!r} "
            "is known and its tokenizer is the library's"
        )
    if used and not is_trusted(folder):
        text = f"moecover: WARNING: running code that comes with {model}: {', '.join(used)}"
        sys.stderr.write(f"{printable(text)}\n")
    _folders.add(folder.resolve())
    if classes is not None:
        _register(folder, family, classes, model)
        _types.add(family)
    return used


def _folder_of(model: str | Path, revision: str | None) -> Path:
    """The folder of a model; of a hub model one that holds its code and settings.

    Raises:
        InputError: there is none.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:
        raise InputError(f"no folder {model}: {error}") from error
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{arg('revision')} is for hub models, {model} is a folder")
        return folder
    if not is_hub_id(str(model)):
        raise InputError(f"{arg('trust_remote_code')} is for folders and hub models, {model} is neither")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=["*.py", "*.json"]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"no folder {model}, and the hub did not give {model}: {reason}") from error


def _json(path: Path) -> Config:
    """An object in a file; an empty one where there is no file or it holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _reference(config: Config, name: str, model: str | Path) -> str | None:
    """The class that a configuration names for an Auto class, the last of several; None where it names none.

    Raises:
        InputError: it is no class in the checkpoint's own files.
    """
    code = config.get(CODE)
    given = code.get(name) if isinstance(code, dict) else None
    several = given if isinstance(given, list) else [given]
    named = next((one for one in reversed(several) if one is not None), None)
    if named is not None and (not isinstance(named, str) or REFERENCE.fullmatch(named) is None):
        raise InputError(
            f"{model}: {CODE} gives {name} as {named!r}, which is no class in a file beside it (FILE.CLASS). Copy the "
            "code into the folder"
        )
    return named


def _classes(config: Config, model: str | Path) -> _Classes:
    """The classes of a model type that transformers does not know.

    Raises:
        InputError: config.json does not name them.
    """
    configuration = _reference(config, "AutoConfig", model)
    for auto in MODELS:
        if configuration is not None and (found := _reference(config, auto, model)) is not None:
            return _Classes(configuration, found, auto)
    raise InputError(
        f"{model}: type {config.get('model_type')!r} is not known to transformers, and {CODE} in config.json does not "
        f"name AutoConfig and one of {', '.join(MODELS)}: there is no code to run"
    )


def _register(folder: Path, family: str, classes: _Classes, model: str | Path) -> None:
    """Import the classes of a configuration and of its model, and enter them in the Auto classes.

    Raises:
        InputError: the code raises an error, or its classes are of another kind.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result
            configuration: Any = get_class_from_dynamic_module(classes.configuration, str(folder))
            model_class: Any = get_class_from_dynamic_module(classes.model, str(folder))
            transformers.AutoConfig.register(family, configuration)
            getattr(transformers, classes.auto).register(configuration, model_class, exist_ok=True)
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{model}: its code raised {type(error).__name__}: {reason}") from error
