"""Model type `deepseek` (DeepSeek-MoE-16B), for which transformers has no class."""
