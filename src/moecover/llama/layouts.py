"""The C declarations of llama.cpp that are used, as data: parameter structs differ between versions, a row each.

From ``llama.h``, ``ggml.h`` and ``ggml-backend.h``. A row is used only where every field of both structs has the value
that the library's own defaults should have there, see `library.load`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Versions (`llama_version`, major and minor) that rows were tested with: builds 10566, 11063 and 11549.
VERSIONS = ("0.2", "0.3", "0.4", "0.5", "0.6")
PADDING = 256  # bytes behind each struct, zero: a field that a later version adds there keeps its zero
TENSOR_BYTES = 336  # of `struct ggml_tensor`
OBJECT_BYTES = 32  # of `struct ggml_object`, which `ggml_tensor_overhead` counts too
F32, F16, I32, BF16 = 0, 1, 26, 30  # numbers of `enum ggml_type`
NO_FLASH_ATTENTION = 0
MMAP = 1  # of `enum llama_load_mode`

Field = tuple[str, str, int | float | None]  # type, name, default; None for a null pointer

MODEL_FIELDS: tuple[Field, ...] = (
    ("void *", "devices", None),
    ("void *", "tensor_buft_overrides", None),
    ("int32_t", "n_gpu_layers", -1),
    ("int", "split_mode", 1),
    ("int", "load_mode", -1),
    ("int", "lazy_mode", 1),
    ("int32_t", "main_gpu", 0),
    ("void *", "tensor_split", None),
    ("void *", "progress_callback", None),
    ("void *", "progress_callback_user_data", None),
    ("void *", "kv_overrides", None),
    ("bool", "vocab_only", 0),
    ("bool", "check_tensors", 0),
    ("bool", "use_extra_bufts", 1),
    ("bool", "no_host", 0),
    ("bool", "no_alloc", 0),
    ("bool", "load_mtp", 0),
)
CONTEXT_FIELDS: tuple[Field, ...] = (
    ("uint32_t", "n_ctx", 512),
    ("uint32_t", "n_batch", 2048),
    ("uint32_t", "n_ubatch", 512),
    ("uint32_t", "n_seq_max", 1),
    ("uint32_t", "n_rs_seq", 0),
    ("uint32_t", "n_outputs_max", 0),
    ("uint32_t", "n_outputs_max_per_seq", 1),
    ("int32_t", "n_threads", 4),
    ("int32_t", "n_threads_batch", 4),
    ("int", "ctx_type", 0),
    ("int", "rope_scaling_type", -1),
    ("int", "pooling_type", -1),
    ("int", "attention_type", -1),
    ("int", "flash_attn_type", -1),
    ("float", "rope_freq_base", 0.0),
    ("float", "rope_freq_scale", 0.0),
    ("float", "yarn_ext_factor", -1.0),
    ("float", "yarn_attn_factor", -1.0),
    ("float", "yarn_beta_fast", -1.0),
    ("float", "yarn_beta_slow", -1.0),
    ("uint32_t", "yarn_orig_ctx", 0),
    ("float", "defrag_thold", -1.0),
    ("void *", "cb_eval", None),
    ("void *", "cb_eval_user_data", None),
    ("int", "type_k", F16),
    ("int", "type_v", F16),
    ("size_t", "moe_cache_size", 0),
    ("void *", "abort_callback", None),
    ("void *", "abort_callback_data", None),
    ("bool", "embeddings", 0),
    ("bool", "offload_kqv", 1),
    ("bool", "no_perf", 1),
    ("bool", "op_offload", 1),
    ("bool", "swa_full", 1),
    ("bool", "kv_unified", 0),
    ("void *", "samplers", None),
    ("size_t", "n_samplers", 0),
    ("void *", "ctx_other", None),
)
DECLARATIONS = """
struct ggml_tensor {
    int type;
    void * buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_tensor * src[10];
    struct ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};
struct ggml_type_traits {
    const char * type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void (*to_float)(const void * x, float * y, int64_t k);
};
typedef struct llama_batch {
    int32_t n_tokens;
    int32_t * token;
    float * embd;
    int32_t * pos;
    int32_t * n_seq_id;
    int32_t ** seq_id;
    int8_t * logits;
} llama_batch;

const char * llama_version(void);
const char * ggml_version(void);
size_t ggml_tensor_overhead(void);
const char * ggml_get_name(const struct ggml_tensor * tensor);
size_t ggml_nbytes(const struct ggml_tensor * tensor);
const struct ggml_type_traits * ggml_get_type_traits(int type);
size_t ggml_backend_reg_count(void);
void * ggml_set_abort_callback(void (*callback)(const char * message));
void ggml_backend_load_all_from_path(const char * dir_path);
bool ggml_backend_buffer_is_host(void * buffer);
void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);

void llama_log_set(void (*callback)(int level, const char * text, void * data), void * data);
void llama_backend_init(void);
bool llama_supports_gpu_offload(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void * llama_model_load_from_file(const char * path, struct llama_model_params params);
void llama_model_free(void * model);
void * llama_init_from_model(void * model, struct llama_context_params params);
void llama_free(void * context);
uint32_t llama_n_ctx(const void * context);
uint32_t llama_n_batch(const void * context);
uint32_t llama_n_ubatch(const void * context);
void * llama_get_memory(const void * context);
void llama_memory_clear(void * memory, bool data);
llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(llama_batch batch);
int32_t llama_decode(void * context, llama_batch batch);
float * llama_get_logits(void * context);
const void * llama_model_get_vocab(const void * model);
int llama_vocab_type(const void * vocab);
int32_t llama_vocab_n_tokens(const void * vocab);
int32_t llama_vocab_bos(const void * vocab);
int32_t llama_vocab_eos(const void * vocab);
bool llama_vocab_is_control(const void * vocab, int32_t token);
const char * llama_vocab_get_text(const void * vocab, int32_t token);
int32_t llama_tokenize(const void * vocab, const char * text, int32_t text_len, int32_t * tokens,
    int32_t n_tokens_max, bool add_special, bool parse_special);
"""


@dataclass(frozen=True)
class Layout:
    """The parameter structs of some versions.

    Attributes:
        model: fields of ``struct llama_model_params``, in order.
        context: fields of ``struct llama_context_params``.
    """

    model: tuple[Field, ...]
    context: tuple[Field, ...]

    @property
    def declarations(self) -> str:
        """The C declarations of this layout."""
        structs = _struct("llama_model_params", self.model) + _struct("llama_context_params", self.context)
        return structs + DECLARATIONS


def _struct(name: str, fields: Iterable[Field]) -> str:
    lines = "".join(f"    {kind} {field};\n" for kind, field, _ in fields)
    return f"struct {name} {{\n{lines}    char padding[{PADDING}];\n}};\n"


def _without(fields: Iterable[Field], *names: str) -> tuple[Field, ...]:
    return tuple(field for field in fields if field[1] not in names)


LAYOUTS = (
    Layout(MODEL_FIELDS, CONTEXT_FIELDS),
    Layout(MODEL_FIELDS, _without(CONTEXT_FIELDS, "moe_cache_size")),
    Layout(_without(MODEL_FIELDS, "lazy_mode"), _without(CONTEXT_FIELDS, "moe_cache_size")),
)
