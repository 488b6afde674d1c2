from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int8_t, int32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from llamastate._native.changes cimport Changes
from llamastate._native.llama cimport (
    llama_adapter_lora,
    llama_context,
    llama_memory_t,
    llama_model,
    llama_vocab,
)

cdef extern from "<shared_mutex>" namespace "std" nogil:
    cdef cppclass shared_mutex:
        void lock()
        cbool try_lock()
        void unlock()
        void lock_shared()
        void unlock_shared()


cdef class Lockable:
    cdef PyThread_type_lock _lock
    cdef unsigned long _holder
    cdef int _depth
    cdef readonly bint raise_if_busy
    cdef int acquire(self, str operation) except -1
    cdef void release(self) noexcept


cdef class _ModelPtr:
    cdef llama_model * ptr
    cdef object keep
    # Of a borrowed model: asked before each use whether its owner has freed it.
    cdef object alive
    cdef bint gone(self)
    # A model keeps a set of its adapters, which llama.cpp walks (unguarded) when a context reserves its graphs. Whoever
    # may make it do so holds this shared, whoever adds or frees an adapter holds it alone. Never wait for it, or for the
    # GIL while holding it alone, with the GIL held.
    cdef shared_mutex adapters_lock
    # Adapters that were let go while the lock was taken; freed with the next one, or by the model.
    cdef vector[llama_adapter_lora *] discarded


cdef class ModelHandle:
    cdef _ModelPtr _owned
    cdef readonly bint vocab_only
    cdef readonly bint borrowed
    cdef llama_model * ptr(self) except NULL
    cdef const llama_vocab * vocab(self) except NULL


cdef class ContextHandle(Lockable):
    cdef llama_context * ptr
    cdef llama_memory_t mem
    cdef _ModelPtr _model
    cdef object _alive
    cdef object __weakref__
    cdef readonly bint borrowed
    cdef readonly int n_ctx
    cdef readonly int n_ctx_seq
    cdef readonly int n_batch
    cdef readonly int n_ubatch
    cdef readonly int n_seq_max
    cdef readonly int n_rs_seq
    cdef readonly int n_vocab
    cdef readonly int n_embd_out
    cdef readonly int pooling_type
    cdef readonly bint m_rope
    cdef readonly bint causal
    cdef readonly bint embeddings
    # Whether the memory is a recurrent state alone: it has positions, but nothing that is rotated by them.
    cdef readonly bint recurrent
    # Sequences with cells whose position was moved (seq_add, seq_div) and whose K rows are not rotated yet: llama.cpp
    # does so at the next decode. Cells that are emptied or overwritten before that are not rotated.
    cdef public frozenset shifted
    # Sequences with cells that others may have too: moving the positions of one would move the other's.
    cdef public frozenset shared
    # Positions were moved or divided at some time: a sequence may have more cells than its positions span.
    cdef public bint moved_cells
    # What the last decode put out, one byte a batch entry: 0 nothing, 1 an output, 2 an output of a sequence whose
    # state has been changed since, so that nobody samples from what is no longer true. And to whom each belonged.
    cdef vector[int8_t] outputs
    cdef vector[int32_t] output_n_seq
    cdef vector[int32_t] output_seqs
    cdef readonly int n_outputs
    # The output buffer grows to the largest number of outputs ever asked for, and moves when it grows.
    cdef int outputs_reserved
    cdef readonly int views
    # ON_DEVICE blobs that are still good: source sequence -> (flags, digest). Kept here because a borrowed context has
    # one handle however often it is attached.
    cdef readonly dict on_device
    # What llama.cpp's storages for such tensors hold: source sequence -> what llamastate.device notes.
    cdef readonly dict device_storage
    # Counts what may have changed cells.
    cdef readonly unsigned long long epoch
    # The same by sequence, for those who rely on what they have left in one.
    cdef readonly Changes changes
    # The adapters in effect, ((Adapter, scale), ...), and what keeps their memory: closing an Adapter gives up its own
    # claim only. Here because a borrowed context has one handle however often it is attached.
    cdef readonly tuple adapters
    cdef object _adapter_claims
    cdef bint close_pending
    cdef int enter(self, str operation) except -1
    cdef int32_t seq(self, seq_id) except -1
    cdef int output(self, long i) except -1
    cdef void free_now(self) noexcept
