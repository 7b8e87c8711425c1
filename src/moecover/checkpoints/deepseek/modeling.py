"""Model type ``deepseek`` (DeepSeek-MoE-16B) for transformers: reads a hub-format checkpoint with no remote code.

The architecture of arXiv 2401.06066, built from parts of the library: Llama's backbone (multi-head attention, rotary
embeddings), a dense MLP in the first layers, then fine-grained routed experts behind a softmax router (top-k after the
softmax, renormalised only with ``norm_topk_prob``) beside shared experts, which are one wider MLP without a gate.
`registration` enters it in the Auto classes.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaPreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter
from transformers.utils.output_capturing import OutputRecorder

from moecover.checkpoints.deepseek.configuration import DeepseekConfig


class DeepseekMoE(nn.Module):
    """Routed experts beside the shared ones (arXiv 2401.06066, equations 9 to 11)."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekV2MLP(config, intermediate_size=width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of the block, of the input's shape ``[batch, position, hidden]``."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        routed: torch.Tensor = self.experts(flat, index, weights).view(hidden_states.shape)
        return routed + self.shared_experts(hidden_states) if hasattr(self, "shared_experts") else routed


class DeepseekPreTrainedModel(LlamaPreTrainedModel):  # type: ignore[misc]
    """What both classes below declare to the library."""

    config_class = DeepseekConfig
    _can_record_outputs = {  # noqa: RUF012 (the library's way)
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
    }
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the experts are another model's, which the library's own test does not see

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Qwen2MoeExperts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
        elif isinstance(module, Qwen2MoeTopKRouter):
            init.normal_(module.weight, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):  # type: ignore[misc]
    """The decoder."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            sparse = config.n_routed_experts is not None and index >= config.first_k_dense_replace
            if sparse and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekMoE(config)
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):  # type: ignore[misc]
    """The decoder with its language-model head."""

    def __init__(self, config: DeepseekConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's own, which would build a Llama decoder
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
