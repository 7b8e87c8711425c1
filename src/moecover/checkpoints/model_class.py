"""The transformers class of a checkpoint, found by its config.json and built without memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import Config
from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.errors import InputError
from moecover.signals import held

if TYPE_CHECKING:
    import torch


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
        raise InputError(
            f"{name}: architecture {family!r} is not known to transformers {transformers.__version__}, "
            "and code that comes with a checkpoint is not run"
        )
    try:
        parsed = CONFIG_MAPPING[family].from_dict(transformers.PreTrainedConfig._decode_special_floats(config))
        if (auto := auto_class(type(parsed))) is None:
            raise InputError(f"{name}: architecture {family!r} is no causal language model")
        with torch.device("meta"):
            model: torch.nn.Module = auto.from_config(parsed)
            return model
    except InputError:
        raise
    except Exception as error:  # the library may raise anything on a configuration that it cannot build
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{name}: transformers cannot build {family!r} from config.json: {reason}") from error
