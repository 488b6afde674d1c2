# What llamastate uses of llama.h and ggml's headers, in their order. No logic here.
#
# Functions that can let a C++ exception escape are marked ``except +``: llama.h is a C API, but the library behind it
# is C++ and some entry points (ON_DEVICE state, grammars, templates) throw straight through it. An exception that is
# not caught here would end the process.

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "ggml.h" nogil:
    enum ggml_type:
        GGML_TYPE_F32
        GGML_TYPE_F16
        GGML_TYPE_Q4_0
        GGML_TYPE_Q4_1
        GGML_TYPE_Q5_0
        GGML_TYPE_Q5_1
        GGML_TYPE_Q8_0
        GGML_TYPE_IQ4_NL
        GGML_TYPE_BF16

    enum ggml_log_level:
        GGML_LOG_LEVEL_NONE
        GGML_LOG_LEVEL_DEBUG
        GGML_LOG_LEVEL_INFO
        GGML_LOG_LEVEL_WARN
        GGML_LOG_LEVEL_ERROR
        GGML_LOG_LEVEL_CONT

    ctypedef void (*ggml_log_callback)(ggml_log_level level, const char * text, void * user_data) noexcept nogil
    ctypedef cbool (*ggml_abort_callback)(void * data) noexcept nogil

    struct ggml_tensor

    ctypedef cbool (*ggml_backend_sched_eval_callback)(ggml_tensor * t, cbool ask, void * user_data) noexcept nogil

    size_t ggml_row_size(ggml_type type, int64_t ne)
    size_t ggml_type_size(ggml_type type)
    int64_t ggml_blck_size(ggml_type type)
    const char * ggml_type_name(ggml_type type)
    const char * ggml_version()
    const char * ggml_commit()


cdef extern from "ggml-backend.h" nogil:
    enum ggml_backend_dev_type_enum "ggml_backend_dev_type":
        GGML_BACKEND_DEVICE_TYPE_GPU
        GGML_BACKEND_DEVICE_TYPE_IGPU

    struct ggml_backend_buffer_type:
        pass
    struct ggml_backend_device:
        pass
    ctypedef ggml_backend_buffer_type * ggml_backend_buffer_type_t
    ctypedef ggml_backend_device * ggml_backend_dev_t

    size_t ggml_backend_buft_get_alignment(ggml_backend_buffer_type_t buft) except +
    ggml_backend_dev_type_enum ggml_backend_dev_type(ggml_backend_dev_t device) except +
    ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device) except +
    size_t ggml_backend_dev_count() except +
    ggml_backend_dev_t ggml_backend_dev_get(size_t index) except +


cdef extern from "llama.h" nogil:
    const uint32_t LLAMA_DEFAULT_SEED
    const int32_t LLAMA_TOKEN_NULL
    const uint32_t LLAMA_SESSION_MAGIC
    const uint32_t LLAMA_SESSION_VERSION
    const uint32_t LLAMA_STATE_SEQ_MAGIC
    const uint32_t LLAMA_STATE_SEQ_VERSION

    struct llama_vocab:
        pass
    struct llama_model:
        pass
    struct llama_context:
        pass
    struct llama_sampler:
        pass
    struct llama_adapter_lora:
        pass
    struct llama_memory_i:
        pass
    ctypedef llama_memory_i * llama_memory_t
    ctypedef int32_t llama_pos
    ctypedef int32_t llama_token
    ctypedef int32_t llama_seq_id

    enum llama_vocab_type_enum "llama_vocab_type":
        LLAMA_VOCAB_TYPE_NONE

    enum llama_rope_type_enum "llama_rope_type":
        LLAMA_ROPE_TYPE_NONE
        LLAMA_ROPE_TYPE_NORM
        LLAMA_ROPE_TYPE_NEOX
        LLAMA_ROPE_TYPE_MROPE
        LLAMA_ROPE_TYPE_IMROPE
        LLAMA_ROPE_TYPE_VISION

    enum llama_rope_scaling_type:
        LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED
        LLAMA_ROPE_SCALING_TYPE_NONE
        LLAMA_ROPE_SCALING_TYPE_LINEAR
        LLAMA_ROPE_SCALING_TYPE_YARN
        LLAMA_ROPE_SCALING_TYPE_LONGROPE

    enum llama_pooling_type_enum "llama_pooling_type":
        LLAMA_POOLING_TYPE_UNSPECIFIED
        LLAMA_POOLING_TYPE_NONE
        LLAMA_POOLING_TYPE_MEAN
        LLAMA_POOLING_TYPE_CLS
        LLAMA_POOLING_TYPE_LAST
        LLAMA_POOLING_TYPE_RANK

    enum llama_flash_attn_type:
        LLAMA_FLASH_ATTN_TYPE_AUTO
        LLAMA_FLASH_ATTN_TYPE_DISABLED
        LLAMA_FLASH_ATTN_TYPE_ENABLED

    enum llama_load_mode:
        LLAMA_LOAD_MODE_AUTO
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
        LLAMA_LOAD_MODE_MLOCK
        LLAMA_LOAD_MODE_MMAP_MLOCK

    ctypedef struct llama_token_data:
        llama_token id
        float logit
        float p

    ctypedef struct llama_token_data_array:
        llama_token_data * data
        size_t size
        int64_t selected
        cbool sorted

    ctypedef struct llama_batch:
        int32_t n_tokens
        llama_token * token
        float * embd
        llama_pos * pos
        int32_t * n_seq_id
        llama_seq_id ** seq_id
        int8_t * logits

    struct llama_model_params:
        int32_t n_gpu_layers
        llama_load_mode load_mode
        int32_t main_gpu
        cbool vocab_only
        cbool check_tensors
        cbool use_extra_bufts

    struct llama_context_params:
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_seq_max
        uint32_t n_rs_seq
        int32_t n_threads
        int32_t n_threads_batch
        llama_rope_scaling_type rope_scaling_type
        llama_pooling_type_enum pooling_type
        llama_flash_attn_type flash_attn_type
        float rope_freq_base
        float rope_freq_scale
        float yarn_ext_factor
        float yarn_attn_factor
        float yarn_beta_fast
        float yarn_beta_slow
        uint32_t yarn_orig_ctx
        ggml_backend_sched_eval_callback cb_eval
        ggml_type type_k
        ggml_type type_v
        ggml_abort_callback abort_callback
        void * abort_callback_data
        cbool embeddings
        cbool offload_kqv
        cbool no_perf
        cbool op_offload
        cbool swa_full
        cbool kv_unified

    ctypedef struct llama_logit_bias:
        llama_token token
        float bias

    ctypedef struct llama_sampler_chain_params:
        cbool no_perf

    const char * llama_version()
    llama_model_params llama_model_default_params()
    llama_context_params llama_context_default_params()
    llama_sampler_chain_params llama_sampler_chain_default_params()
    void llama_backend_init() except +
    llama_model * llama_model_load_from_file(const char * path_model, llama_model_params params) except +
    void llama_model_free(llama_model * model)
    llama_context * llama_init_from_model(llama_model * model, llama_context_params params) except +
    void llama_free(llama_context * ctx)
    size_t llama_max_parallel_sequences()

    uint32_t llama_n_ctx(const llama_context * ctx)
    uint32_t llama_n_ctx_seq(const llama_context * ctx)
    uint32_t llama_n_batch(const llama_context * ctx)
    uint32_t llama_n_ubatch(const llama_context * ctx)
    uint32_t llama_n_seq_max(const llama_context * ctx)
    uint32_t llama_n_rs_seq(const llama_context * ctx)
    const llama_model * llama_get_model(const llama_context * ctx)
    llama_memory_t llama_get_memory(const llama_context * ctx)
    llama_pooling_type_enum llama_pooling_type(const llama_context * ctx)
    const llama_vocab * llama_model_get_vocab(const llama_model * model)
    llama_rope_type_enum llama_model_rope_type(const llama_model * model)

    int32_t llama_model_n_ctx_train(const llama_model * model)
    int32_t llama_model_n_embd(const llama_model * model)
    int32_t llama_model_n_embd_out(const llama_model * model)
    int32_t llama_model_n_layer(const llama_model * model)
    int32_t llama_model_n_head(const llama_model * model)
    int32_t llama_model_n_head_kv(const llama_model * model)
    int32_t llama_model_n_swa(const llama_model * model)
    uint32_t llama_model_n_cls_out(const llama_model * model)
    llama_vocab_type_enum llama_vocab_type(const llama_vocab * vocab)
    int32_t llama_vocab_n_tokens(const llama_vocab * vocab)
    int32_t llama_model_meta_count(const llama_model * model)
    int32_t llama_model_meta_key_by_index(const llama_model * model, int32_t i, char * buf, size_t buf_size)
    int32_t llama_model_meta_val_str_by_index(const llama_model * model, int32_t i, char * buf, size_t buf_size)
    int32_t llama_model_desc(const llama_model * model, char * buf, size_t buf_size)
    uint64_t llama_model_size(const llama_model * model)
    const char * llama_model_chat_template(const llama_model * model, const char * name)
    uint64_t llama_model_n_params(const llama_model * model)
    cbool llama_model_has_encoder(const llama_model * model)
    cbool llama_model_has_decoder(const llama_model * model)
    cbool llama_model_is_recurrent(const llama_model * model)
    cbool llama_model_is_hybrid(const llama_model * model)
    cbool llama_model_is_diffusion(const llama_model * model)

    llama_adapter_lora * llama_adapter_lora_init(llama_model * model, const char * path_lora) except +
    void llama_adapter_lora_free(llama_adapter_lora * adapter)
    int32_t llama_set_adapters_lora(
        llama_context * ctx, llama_adapter_lora ** adapters, size_t n_adapters, float * scales) except +

    void llama_memory_clear(llama_memory_t mem, cbool data)
    cbool llama_memory_seq_rm(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1)
    void llama_memory_seq_cp(llama_memory_t mem, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1)
    void llama_memory_seq_keep(llama_memory_t mem, llama_seq_id seq_id)
    void llama_memory_seq_add(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos delta)
    void llama_memory_seq_div(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d)
    llama_pos llama_memory_seq_pos_min(llama_memory_t mem, llama_seq_id seq_id)
    llama_pos llama_memory_seq_pos_max(llama_memory_t mem, llama_seq_id seq_id)
    cbool llama_memory_can_shift(llama_memory_t mem)

    size_t llama_state_get_size(llama_context * ctx) except +
    size_t llama_state_get_data(llama_context * ctx, uint8_t * dst, size_t size) except +
    size_t llama_state_set_data(llama_context * ctx, const uint8_t * src, size_t size) except +

    const uint32_t LLAMA_STATE_SEQ_FLAGS_NONE
    const uint32_t LLAMA_STATE_SEQ_FLAGS_SWA_ONLY
    const uint32_t LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    const uint32_t LLAMA_STATE_SEQ_FLAGS_ON_DEVICE
    ctypedef uint32_t llama_state_seq_flags
    size_t llama_state_seq_get_size_ext(
        llama_context * ctx, llama_seq_id seq_id, llama_state_seq_flags flags) except +
    size_t llama_state_seq_get_data_ext(
        llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) except +
    size_t llama_state_seq_set_data_ext(
        llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id dest_seq_id,
        llama_state_seq_flags flags) except +

    int32_t llama_encode(llama_context * ctx, llama_batch batch) except +
    int32_t llama_decode(llama_context * ctx, llama_batch batch) except +
    void llama_set_n_threads(llama_context * ctx, int32_t n_threads, int32_t n_threads_batch)
    int32_t llama_n_threads(llama_context * ctx)
    int32_t llama_n_threads_batch(llama_context * ctx)
    void llama_set_abort_callback(llama_context * ctx, ggml_abort_callback abort_callback, void * abort_callback_data)
    cbool llama_get_causal_attn(const llama_context * ctx)
    void llama_synchronize(llama_context * ctx) except +
    float * llama_get_logits_ith(llama_context * ctx, int32_t i) except +
    float * llama_get_embeddings_ith(llama_context * ctx, int32_t i) except +
    float * llama_get_embeddings_seq(llama_context * ctx, llama_seq_id seq_id) except +

    cbool llama_vocab_is_eog(const llama_vocab * vocab, llama_token token)
    cbool llama_vocab_is_control(const llama_vocab * vocab, llama_token token)
    llama_token llama_vocab_bos(const llama_vocab * vocab)
    llama_token llama_vocab_eos(const llama_vocab * vocab)
    llama_token llama_vocab_eot(const llama_vocab * vocab)
    llama_token llama_vocab_nl(const llama_vocab * vocab)
    llama_token llama_vocab_pad(const llama_vocab * vocab)
    cbool llama_vocab_get_add_bos(const llama_vocab * vocab)
    cbool llama_vocab_get_add_eos(const llama_vocab * vocab)
    int32_t llama_tokenize(
        const llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        cbool add_special, cbool parse_special) except +
    int32_t llama_token_to_piece(
        const llama_vocab * vocab, llama_token token, char * buf, int32_t length, int32_t lstrip,
        cbool special) except +
    int32_t llama_detokenize(
        const llama_vocab * vocab, const llama_token * tokens, int32_t n_tokens, char * text, int32_t text_len_max,
        cbool remove_special, cbool unparse_special) except +

    llama_sampler * llama_sampler_chain_init(llama_sampler_chain_params params) except +
    void llama_sampler_chain_add(llama_sampler * chain, llama_sampler * smpl) except +
    llama_sampler * llama_sampler_chain_get(llama_sampler * chain, int32_t i)
    void llama_sampler_accept(llama_sampler * smpl, llama_token token) except +
    void llama_sampler_apply(llama_sampler * smpl, llama_token_data_array * cur_p) except +
    void llama_sampler_reset(llama_sampler * smpl) except +
    llama_sampler * llama_sampler_clone(const llama_sampler * smpl) except +
    void llama_sampler_free(llama_sampler * smpl)
    llama_sampler * llama_sampler_init_greedy() except +
    llama_sampler * llama_sampler_init_dist(uint32_t seed) except +
    llama_sampler * llama_sampler_init_top_k(int32_t k) except +
    llama_sampler * llama_sampler_init_top_p(float p, size_t min_keep) except +
    llama_sampler * llama_sampler_init_min_p(float p, size_t min_keep) except +
    llama_sampler * llama_sampler_init_typical(float p, size_t min_keep) except +
    llama_sampler * llama_sampler_init_temp(float t) except +
    llama_sampler * llama_sampler_init_penalties(
        int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat, float penalty_freq,
        float penalty_present) except +
    llama_sampler * llama_sampler_init_grammar(
        const llama_vocab * vocab, const char * grammar_str, const char * grammar_root) except +
    llama_sampler * llama_sampler_init_logit_bias(
        int32_t n_vocab, int32_t n_logit_bias, const llama_logit_bias * logit_bias) except +

    void llama_log_get(ggml_log_callback * log_callback, void ** user_data)
    void llama_log_set(ggml_log_callback log_callback, void * user_data)
