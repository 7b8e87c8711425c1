"""Which model types are proven, in width too, and which are refused: tables. A type in neither runs with a warning."""

# Types proven end to end by tests/checkpoints/test_families.py, with the routing of their class's default configuration
# (as `planning.search.routing` recognises it; "its own": one that expert-sparsity cannot re-route).
PROVEN_FAMILIES = {
    "afmoe": "sigmoid + bias for the choice, renormalised",
    "aria": "softmax, renormalised",
    "aria_text": "softmax, renormalised",
    "axk1": "sigmoid + bias for the choice, best groups first, renormalised",
    "axk2": "its own",
    "bailing_hybrid": "sigmoid + bias for the choice, best groups first, renormalised",
    "beam": "sigmoid + bias for the choice, best groups first, renormalised",
    "cohere2_moe": "softmax, renormalised",
    "deepseek": "softmax",
    "deepseek_ocr2": "softmax",
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid + bias for the choice, best groups first, renormalised",
    "deepseek_v32": "sigmoid + bias for the choice, best groups first, renormalised",
    "deepseek_v4": "its own",
    "dots1": "sigmoid + bias for the choice, best groups first",
    "dots3_note": "sigmoid + bias for the choice, best groups first, renormalised",
    "dots3_note_text": "sigmoid + bias for the choice, best groups first, renormalised",
    "ernie4_5_moe": "softmax + bias for the choice, renormalised",
    "exaone_moe": "sigmoid + bias for the choice, best groups first, renormalised",
    "flex_olmo": "softmax",
    "flint": "sigmoid, renormalised",
    "gemma4": "its own",
    "gemma4_text": "its own",
    "glm4_moe": "sigmoid + bias for the choice, best groups first, renormalised",
    "glm4_moe_lite": "sigmoid + bias for the choice, best groups first, renormalised",
    "glm4v_moe": "sigmoid + bias for the choice, best groups first, renormalised",
    "glm5_next": "sigmoid + bias for the choice, best groups first, renormalised",
    "glm_moe_dsa": "sigmoid + bias for the choice, best groups first, renormalised",
    "gpt_oss": "softmax, renormalised",
    "granitemoe": "softmax, renormalised",
    "granitemoe_swa": "softmax, renormalised",
    "granitemoehybrid": "softmax, renormalised",
    "granitemoeshared": "softmax, renormalised",
    "hunyuan_v1_moe": "softmax, renormalised",
    "hy_v3": "sigmoid + bias for the choice, renormalised",
    "hy_v4": "sigmoid + bias for the choice, best groups first, renormalised",
    "inkling2": "sigmoid + bias for the choice, renormalised",
    "inkling2_text": "sigmoid + bias for the choice, renormalised",
    "inkling_mm_model": "its own",
    "inkling_text": "its own",
    "jamba": "softmax",
    "kimi_k2": "sigmoid + bias for the choice, best groups first, renormalised",
    "kimi_k25": "sigmoid + bias for the choice, best groups first, renormalised",
    "kimi_linear": "sigmoid + bias for the choice, renormalised",
    "kolibri1": "its own",
    "laguna": "sigmoid + bias for the choice, renormalised",
    "lfm2_moe": "sigmoid + bias for the choice, renormalised",
    "llama4": "its own",
    "llama4_text": "its own",
    "mellum": "softmax, renormalised",
    "mimo_v2_flash": "sigmoid + bias for the choice, best groups first, renormalised",
    "minimax": "softmax, renormalised",
    "minimax_m2": "sigmoid + bias for the choice, renormalised",
    "minimax_m3_vl": "sigmoid + bias for the choice, renormalised",
    "minimax_m3_vl_text": "sigmoid + bias for the choice, renormalised",
    "mistral4": "softmax, best groups first, renormalised",
    "mistral_large4": "softmax, best groups first, renormalised",
    "mixtral": "softmax, renormalised",
    "muse_spark": "its own",
    "nemotron_h": "sigmoid + bias for the choice, best groups first, renormalised",
    "nemotron_h_omni": "sigmoid + bias for the choice, best groups first, renormalised",
    "olmoe": "softmax",
    "phimoe": "its own",
    "qwen2_moe": "softmax",
    "qwen3_5_moe": "softmax, renormalised",
    "qwen3_5_moe_text": "softmax, renormalised",
    "qwen3_moe": "softmax",
    "qwen3_next": "softmax, renormalised",
    "qwen3_omni_moe_thinker": "softmax, renormalised",
    "qwen3_vl_moe": "softmax, renormalised",
    "qwen4_exp": "softmax, renormalised",
    "qwen4_exp_text": "softmax, renormalised",
    "solar_open": "sigmoid + bias for the choice, best groups first, renormalised",
    "step3p7": "sigmoid + bias for the choice, renormalised",
    "unlimited_ocr": "softmax",
}
PROVEN_WITH = "5.23.0"  # the version of transformers that the tests ran with

# Proven types whose experts cannot be cut thinner, and why: what `Structure.width` says of their class.
_STACKED = "its experts do not say how gate and up projection lie in one tensor"
_WITH_SHARED = "its width sizes the shared expert too, and no other key can make up for it"
_SHARED = "its count of shared experts sizes more than these"
WHOLE_EXPERTS_ONLY = {
    "deepseek_v4": _WITH_SHARED,
    "hunyuan_v1_moe": _WITH_SHARED,
    "inkling_mm_model": _SHARED,
    "inkling_text": _SHARED,
    "jamba": "its width sizes the dense layers too",
    "llama4": _STACKED,
    "llama4_text": _STACKED,
    "muse_spark": "its width sizes projections around the experts too",
    "step3p7": _STACKED,
}

_ENCODER = "its encoder and its decoder both have layers with experts, under one count"
# Why `inspect`, `profile` and `prune` refuse a type; completes "TYPE is not supported: ...".
UNSUPPORTED: dict[str, str] = {
    "dbrx": "the experts of a layer are stacked in one matrix, and the choice is made outside its router",
    "diffusion_gemma": _ENCODER,
    "doge": "an expert is one row of an embedding, found by a pair of keys",
    "ernie4_5_vl_moe": "a layer has two groups of experts, for text and for images, of two widths and under one count",
    "jetmoe": "its attention has experts too, under the same count",
    "longcat_flash": "a token may go to experts that do nothing, which its router numbers after the others",
    "nllb-moe": _ENCODER,
    "openai_privacy_filter": "it labels tokens and predicts none, so that no perplexity says what a cut costs",
    "qwen3_omni_moe": "its thinker and its talker both have experts: prune the thinker, a qwen3_omni_moe_thinker, by "
    "itself",
    "switch_transformers": _ENCODER,
    "zaya": "a token may skip the experts of a layer, which its router reports as expert 0 with weight 0",
}

_ALL_TOKENS = "its experts run on all tokens, so that nothing shows how many a token is sent to"
FIXED_TOP_K = {  # types whose number of experts per token cannot be changed, and why
    "llama4": _ALL_TOKENS,
    "llama4_text": _ALL_TOKENS,
    "phimoe": "its router chooses two experts, whatever config.json says",
}
