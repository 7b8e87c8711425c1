"""Model type `deepseek` (DeepSeek-MoE-16B), which transformers does not have."""
