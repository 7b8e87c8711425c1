"""The transformers class of a checkpoint, found by its config.json and built without memory."""

from __future__ import annotations

import difflib
import threading
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import Config
from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.families import PROVEN_FAMILIES
from moecover.checkpoints.names import OTHER_PARTS
from moecover.checkpoints.remote_code import CODE
from moecover.errors import InputError
from moecover.signals import held

if TYPE_CHECKING:
    import torch

# transformers replaces methods of its classes while it builds or loads a model. Of two threads that do so at once, one
# may put back what the other had replaced: from then on the process loads without tied weights, for example.
BUILDING = threading.RLock()


def auto_class(config_class: type) -> Any:
    """The Auto class that builds a language model, multimodal ones included, from a configuration class.

    Returns:
        ``AutoModelForCausalLM`` or ``AutoModelForImageTextToText``; None if neither has a model for the class.
    """
    register_deepseek()
    import transformers
    from transformers.models.auto import modeling_auto

    if config_class in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if config_class in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return None


def _known_type(config: Config, family: str) -> str:
    """A sentence on the known model type that an unknown one would pass as; empty if there is none."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for key, part in config.items():
        if (
            isinstance(part, dict)
            and not OTHER_PARTS.search(f"{key}.")
            and str(part.get("model_type")) in CONFIG_MAPPING
        ):
            return f". Its {key} is of the known type {part['model_type']!r}: prune that language model by itself"
    names = {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    given = config.get("architectures")
    classes = given if isinstance(given, list) else []
    for known, class_names in names.items():
        if found := set(map(str, classes[:1])) & {*([class_names] if isinstance(class_names, str) else class_names)}:
            return f". Its class {found.pop()} is that of {known!r}: if its files are too, make that its model_type"
    if close := difflib.get_close_matches(family, PROVEN_FAMILIES, n=1):
        return f". The known type of the nearest name is {close[0]!r}"
    return ""


def parsed_config(config: Config) -> Any:
    """The library's configuration of a raw one of a known type; raises whatever the library does."""
    import transformers

    register_deepseek()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = transformers.PreTrainedConfig._decode_special_floats(config)
    return CONFIG_MAPPING[str(config.get("model_type"))].from_dict(raw)


def build_on_meta(config: Config, name: str) -> torch.nn.Module:
    """A model of the class of a raw config on torch's ``meta`` device, without memory.

    Args:
        config: parsed config.json.
        name: the checkpoint, in messages.

    Raises:
        InputError: transformers does not know the architecture, or cannot build it.
    """
    with held():
        import torch
        import transformers
    register_deepseek()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING:
        trusted = " unless it is trusted: --trust-remote-code, in Python moecover.trust_remote_code"
        way_out = trusted if config.get(CODE) else ""
        raise InputError(
            f"{name}: architecture {family!r} is not known to transformers {transformers.__version__}, "
            f"and code that comes with a checkpoint is not run{way_out or _known_type(config, family)}"
        )
    try:
        parsed = parsed_config(config)
        if (auto := auto_class(type(parsed))) is None:
            raise InputError(f"{name}: architecture {family!r} is no causal language model")
        with BUILDING, torch.device("meta"):
            model: torch.nn.Module = auto.from_config(parsed)
            return model
    except InputError:
        raise
    except Exception as error:  # the library may raise anything on a configuration that it cannot build
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: transformers cannot build {family!r} from config.json: {reason}") from error
