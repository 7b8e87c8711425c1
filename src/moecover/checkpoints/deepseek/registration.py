"""Enters model type ``deepseek`` in the Auto classes of transformers, which has no class of its own for it.

Importing this module changes nothing: `register_deepseek` does, and everything of this package that builds or loads a
model calls it first.
"""

from __future__ import annotations

from moecover.signals import held

TYPE = "deepseek"
SAME_NAMES = "qwen2_moe"  # the model type whose names on disk and in memory it shares


def register_deepseek() -> None:
    """Enter model type ``deepseek`` (DeepSeek-MoE-16B) in the Auto classes of transformers.

    After this, ``AutoConfig`` and ``AutoModelForCausalLM`` load its checkpoints without remote code, whatever was
    imported before. Calling it again does nothing, and nothing happens where transformers has a class of its own for
    the type.
    """
    with held():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from moecover.checkpoints.deepseek.configuration import DeepseekConfig

    register_deepseek_config()
    if CONFIG_MAPPING[TYPE] is not DeepseekConfig or DeepseekConfig in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    from transformers import conversion_mapping

    from moecover.checkpoints.deepseek.modeling import DeepseekForCausalLM

    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(SAME_NAMES)
    conversion_mapping.register_checkpoint_conversion_mapping(TYPE, mapping, overwrite=True)


def register_deepseek_config() -> None:
    """Enter the configuration of model type ``deepseek`` alone, which tokenizers are found by."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if TYPE not in CONFIG_MAPPING:
        from moecover.checkpoints.deepseek.configuration import DeepseekConfig

        CONFIG_MAPPING.register(TYPE, DeepseekConfig)
