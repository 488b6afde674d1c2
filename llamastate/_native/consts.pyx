# distutils: language = c++
# cython: language_level=3
"""Numbers of ``llama.h`` and ``ggml.h`` as the compiler saw them: Python never repeats them by hand."""

from llamastate._native cimport llama as c

FLAG_NONE = c.LLAMA_STATE_SEQ_FLAGS_NONE
FLAG_SWA_ONLY = c.LLAMA_STATE_SEQ_FLAGS_SWA_ONLY
FLAG_PARTIAL_ONLY = c.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
FLAG_ON_DEVICE = c.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE

SESSION_MAGIC = c.LLAMA_SESSION_MAGIC
SESSION_VERSION = c.LLAMA_SESSION_VERSION
STATE_SEQ_MAGIC = c.LLAMA_STATE_SEQ_MAGIC
STATE_SEQ_VERSION = c.LLAMA_STATE_SEQ_VERSION

DEFAULT_SEED = c.LLAMA_DEFAULT_SEED
MAX_PARALLEL_SEQUENCES = c.llama_max_parallel_sequences()

#: KV cache types that llama.cpp's own tools offer, by their ggml names.
CACHE_TYPES = {
    "f32": <int> c.GGML_TYPE_F32,
    "f16": <int> c.GGML_TYPE_F16,
    "bf16": <int> c.GGML_TYPE_BF16,
    "q8_0": <int> c.GGML_TYPE_Q8_0,
    "q4_0": <int> c.GGML_TYPE_Q4_0,
    "q4_1": <int> c.GGML_TYPE_Q4_1,
    "q5_0": <int> c.GGML_TYPE_Q5_0,
    "q5_1": <int> c.GGML_TYPE_Q5_1,
    "iq4_nl": <int> c.GGML_TYPE_IQ4_NL,
}

FLASH_ATTN = {
    "auto": <int> c.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": <int> c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": <int> c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}

POOLING = {
    "unspecified": <int> c.LLAMA_POOLING_TYPE_UNSPECIFIED,
    "none": <int> c.LLAMA_POOLING_TYPE_NONE,
    "mean": <int> c.LLAMA_POOLING_TYPE_MEAN,
    "cls": <int> c.LLAMA_POOLING_TYPE_CLS,
    "last": <int> c.LLAMA_POOLING_TYPE_LAST,
    "rank": <int> c.LLAMA_POOLING_TYPE_RANK,
}

ROPE_SCALING = {
    "unspecified": <int> c.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
    "none": <int> c.LLAMA_ROPE_SCALING_TYPE_NONE,
    "linear": <int> c.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": <int> c.LLAMA_ROPE_SCALING_TYPE_YARN,
    "longrope": <int> c.LLAMA_ROPE_SCALING_TYPE_LONGROPE,
}

LLAMA_VERSION = (<bytes> c.llama_version()).decode()
GGML_VERSION = (<bytes> c.ggml_version()).decode()
GGML_COMMIT = (<bytes> c.ggml_commit()).decode()
