"""Enters model type ``deepseek`` in the Auto classes of transformers, which has no class of its own for it.

Importing this module changes nothing: `register_deepseek` does, and everything of this package that builds or loads a
model calls it first.
"""

from __future__ import annotations

from moecover.signals import held

TYPE = "deepseek"
SAME_NAMES = "qwen2_moe"  # the model type whose names on disk and in memory it shares
ALIASES = {"kimi_k2": "deepseek_v3"}  # other names of types that transformers has a class for


def register_deepseek() -> None:
    """Enter model type ``deepseek`` (DeepSeek-MoE-16B), and other names of DeepSeek's types, in the Auto classes.

    After this, ``AutoConfig`` and ``AutoModelForCausalLM`` load its checkpoints without remote code, whatever was
    imported before. Calling it again does nothing, and nothing happens where transformers has a class of its own for
    the type.
    """
    with held():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from moecover.checkpoints.deepseek.configuration import DeepseekConfig

    register_deepseek_config()
    for alias, known in ALIASES.items():
        _register_model(alias, known)
    if CONFIG_MAPPING[TYPE] is not DeepseekConfig or DeepseekConfig in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    from transformers import conversion_mapping

    from moecover.checkpoints.deepseek.modeling import DeepseekForCausalLM

    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(SAME_NAMES)
    conversion_mapping.register_checkpoint_conversion_mapping(TYPE, mapping, overwrite=True)


def _register_model(alias: str, known: str) -> None:
    """Enter the model class of a type under another name of the type."""
    from transformers import conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config_class = CONFIG_MAPPING[alias]
    if config_class.__module__ != __name__ or config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    base = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[known]]
    # In the module of its base: transformers looks there for the kernels that a class may choose.
    model_class = type(base.__name__, (base,), {"config_class": config_class, "__module__": base.__module__})
    AutoModelForCausalLM.register(config_class, model_class)
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(known)
    conversion_mapping.register_checkpoint_conversion_mapping(alias, mapping, overwrite=True)


def register_deepseek_config() -> None:
    """Enter the configuration of model type ``deepseek`` and of the other names alone; tokenizers are found by it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if TYPE not in CONFIG_MAPPING:
        from moecover.checkpoints.deepseek.configuration import DeepseekConfig

        CONFIG_MAPPING.register(TYPE, DeepseekConfig)
    for alias, known in ALIASES.items():
        if alias not in CONFIG_MAPPING:
            base = CONFIG_MAPPING[known]
            # By a name of its own: transformers' mappings look configurations up by the names of their classes.
            name = f"{alias.title().replace('_', '')}Config"
            members = {"model_type": alias, "__module__": __name__, "__doc__": base.__doc__}
            CONFIG_MAPPING.register(alias, type(name, (base,), members))
