# distutils: language = c++
# cython: language_level=3
"""Who owns what llama.cpp allocated, for how long, and which thread may touch it.

The rules that the rest of ``_native`` relies on:

* A ``llama_model`` is freed when the last handle that needs it is gone: closing a :class:`ModelHandle` gives up its
  own claim, contexts made from it keep theirs. So a context never outlives its weights, in whatever order the
  interpreter tears things down (``no_gc_clear`` keeps that true inside reference cycles as well).
* A ``llama_context`` is freed by :meth:`ContextHandle.close`, or with the last reference. While a view of its logits
  is alive the memory stays, although the handle already counts as closed.
* A *borrowed* pointer (from a ``llama_cpp.Llama``) is never freed here. Its owner is kept alive, and asked before each
  use whether the pointer still stands.
* Every use of a context happens between ``enter`` and ``release``. The lock is reentrant, so that a compound operation
  can hold it over several calls. Holder and depth are only written with the GIL held; waiting gives the GIL up.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from cpython.pythread cimport (
    NOWAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_get_thread_ident,
    PyThread_release_lock,
    PyThread_type_lock,
)
from libc.stdint cimport uintptr_t

from llamastate._native cimport llama as c
from llamastate._native import log
from llamastate._native.changes cimport count_changes
from llamastate.errors import (
    ClosedError,
    ContextBusyError,
    ContextCreateError,
    InvalidSequenceError,
    LogitsUnavailableError,
    ModelLoadError,
)
from llamastate.words import brief

cdef extern from "pythread.h" nogil:
    ctypedef enum PyLockStatus:
        PY_LOCK_ACQUIRED
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock lock, long long microseconds, int intr_flag)

# Microseconds between two looks for Ctrl-C while waiting for a lock.
cdef long long WAIT_SLICE = 100_000


cdef class Lockable:
    """A reentrant lock, and what to do when another thread holds it."""

    def __cinit__(self, *args, bint raise_if_busy=False, **kwargs):
        self._lock = PyThread_allocate_lock()
        if self._lock == NULL:
            raise MemoryError("no lock")
        self.raise_if_busy = raise_if_busy

    def __dealloc__(self):
        if self._lock != NULL:
            PyThread_free_lock(self._lock)
            self._lock = NULL

    cdef int acquire(self, str operation) except -1:
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef PyLockStatus status
        if self._depth and self._holder == me:
            self._depth += 1
            return 0
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            if self.raise_if_busy:
                raise ContextBusyError(f"{operation}: another thread is using this context", operation=operation)
            while True:
                with nogil:
                    status = PyThread_acquire_lock_timed(self._lock, WAIT_SLICE, 1)
                if status == PY_LOCK_ACQUIRED:
                    break
                PyErr_CheckSignals()
        self._holder = me
        self._depth = 1
        return 0

    cdef void release(self) noexcept:
        self._depth -= 1
        if self._depth == 0:
            self._holder = 0
            PyThread_release_lock(self._lock)


@cython.no_gc_clear
cdef class _ModelPtr:
    """The one place that frees a ``llama_model`` (``llama_model_free``)."""

    def __dealloc__(self):
        if self.ptr != NULL and self.keep is None:
            c.llama_model_free(self.ptr)
        self.ptr = NULL

    cdef bint gone(self):
        return self.alive is not None and not self.alive()


cdef class ModelHandle:
    """A claim on a ``llama_model``."""

    def __init__(self):
        raise TypeError("use load_model() or borrow_model()")

    cdef llama_model * ptr(self) except NULL:
        if self._owned is None or self._owned.gone():
            raise ClosedError("the model is closed", what="model")
        return self._owned.ptr

    cdef const llama_vocab * vocab(self) except NULL:
        return c.llama_model_get_vocab(self.ptr())

    @property
    def closed(self):
        """Whether the model may no longer be used."""
        return self._owned is None or self._owned.gone()

    def close(self):
        """Give up the claim. The weights go when no context needs them any more. Idempotent."""
        self._owned = None


def gpu_alignments():
    """What buffers are aligned to, in bytes, on each device that llama.cpp would put layers on: one or none, as a rule."""
    cdef size_t i
    cdef c.ggml_backend_dev_t device
    cdef c.ggml_backend_dev_type_enum kind
    found = []
    for i in range(c.ggml_backend_dev_count()):
        device = c.ggml_backend_dev_get(i)
        kind = c.ggml_backend_dev_type(device)
        if kind == c.GGML_BACKEND_DEVICE_TYPE_GPU or kind == c.GGML_BACKEND_DEVICE_TYPE_IGPU:
            found.append(c.ggml_backend_buft_get_alignment(c.ggml_backend_dev_buffer_type(device)))
    return found


def load_model(bytes path, *, int n_gpu_layers, bint use_mmap, bint use_mlock, bint vocab_only, bint check_tensors,
               int main_gpu, bint use_extra_bufts):
    """Load a GGUF file (``llama_model_load_from_file``). Releases the GIL.

    Raises
    ------
    ModelLoadError
        With llama.cpp's own words as ``reason``.
    """
    cdef c.llama_model_params params = c.llama_model_default_params()
    cdef const char * p = path
    cdef llama_model * model
    params.n_gpu_layers = n_gpu_layers
    params.main_gpu = main_gpu
    params.use_extra_bufts = use_extra_bufts
    params.vocab_only = vocab_only
    params.check_tensors = check_tensors
    if use_mmap:
        params.load_mode = c.LLAMA_LOAD_MODE_MMAP_MLOCK if use_mlock else c.LLAMA_LOAD_MODE_MMAP
    else:
        params.load_mode = c.LLAMA_LOAD_MODE_MLOCK if use_mlock else c.LLAMA_LOAD_MODE_NONE
    name = path.decode("utf-8", "surrogateescape")
    log.install(True)  # whoever was imported since may have taken the log, and with it llama.cpp's reasons
    log.clear_errors()
    try:
        with nogil:
            model = c.llama_model_load_from_file(p, params)
    except (RuntimeError, IndexError, MemoryError, ValueError, OverflowError) as error:
        raise ModelLoadError(f"cannot load {name}: {error}", path=name, reason=str(error)) from None
    if model == NULL:
        reason = log.take_errors() or "llama.cpp gave no reason"
        raise ModelLoadError(f"cannot load {name}: {reason}", path=name, reason=reason)
    return _wrap_model(model, vocab_only, None)


def borrow_model(uintptr_t address, keep):
    """Wrap a ``llama_model *`` that ``keep`` owns."""
    if address == 0:
        raise ClosedError("the model is closed", what="model")
    return _wrap_model(<llama_model *> address, False, keep)


cdef ModelHandle _wrap_model(llama_model * model, bint vocab_only, keep):
    cdef _ModelPtr owned = _ModelPtr.__new__(_ModelPtr)
    cdef ModelHandle handle = ModelHandle.__new__(ModelHandle)
    owned.keep = keep
    owned.ptr = model
    handle._owned = owned
    handle.vocab_only = vocab_only
    handle.borrowed = keep is not None
    return handle


@cython.no_gc_clear
cdef class ContextHandle(Lockable):
    """A ``llama_context``, its lock, and what is known about its last decode."""

    def __init__(self, *args, **kwargs):
        if self.ptr == NULL:
            raise TypeError("use create_context() or borrow_context()")

    def __dealloc__(self):
        self.free_now()

    cdef void free_now(self) noexcept:
        if self.ptr != NULL and not self.borrowed:
            c.llama_free(self.ptr)
        self.ptr = NULL
        self.mem = NULL
        self.adapters = ()
        self._adapter_claims = None
        self._model = None

    cdef int enter(self, str operation) except -1:
        self.acquire(operation)
        if self.ptr == NULL or self.close_pending or (self._alive is not None and not self._alive()):
            self.release()
            where = "" if operation == "context" else f"{operation}: "
            raise ClosedError(f"{where}the context is closed", what="context")
        return 0

    cdef int32_t seq(self, seq_id) except -1:
        # llama.cpp aborts on ids past its own table of 256, and accepts some that are past n_seq_max
        cdef long n
        try:
            n = PyNumber_Index(seq_id)  # a plain conversion would take 0.7 for 0
        except TypeError:
            raise InvalidSequenceError(
                f"seq_id is {type(seq_id).__name__}, not an integer", seq_id=seq_id, n_seq_max=self.n_seq_max
            ) from None
        except OverflowError:
            n = -1
        if n < 0 or n >= self.n_seq_max:
            raise InvalidSequenceError(
                f"sequence id {brief(seq_id)} is not in [0, {self.n_seq_max}): the context was made with n_seq_max = "
                f"{self.n_seq_max}", seq_id=seq_id, n_seq_max=self.n_seq_max
            )
        return <int32_t> n

    cdef int output(self, long i) except -1:
        # llama.h: i >= 0 counts batch entries, i < 0 counts outputs from the last. Gives the batch index.
        cdef long n = <long> self.outputs.size()
        cdef long at = -1
        cdef long left
        if 0 <= i < n:
            at = i
        elif -self.n_outputs <= i < 0:
            at = n
            left = -i
            while left:
                at -= 1
                left -= self.outputs[at] != 0
        if n == 0:
            raise LogitsUnavailableError(
                "nothing has been decoded, and a state brings no logits along: decode a token, after a restore the last "
                "one again",
                index=i, n_outputs=0,
            )
        if at < 0 or self.outputs[at] == 0:
            raise LogitsUnavailableError(
                f"no output for index {i}: the last batch had {n} tokens and {self.n_outputs} outputs",
                index=i, n_outputs=self.n_outputs,
            )
        if self.outputs[at] == 2:
            raise LogitsUnavailableError(
                f"the output for index {i} belongs to a state that has been changed since: decode the last token again",
                index=i,
                n_outputs=self.n_outputs,
            )
        return <int> at

    def forget_outputs(self, seq_id=None, keep=None):
        """From now on the outputs of this sequence (of all; of all but ``keep``) are not to be had."""
        cdef size_t i, j, at = 0
        cdef int32_t seq = -1 if seq_id is None else seq_id
        cdef int32_t kept = -1 if keep is None else keep
        cdef bint hit
        self.acquire("forget_outputs")
        self.epoch += 1
        try:
            for i in range(self.outputs.size()):
                hit = False
                for j in range(<size_t> self.output_n_seq[i]):
                    hit = hit or (self.output_seqs[at + j] != kept if seq < 0 else self.output_seqs[at + j] == seq)
                at += self.output_n_seq[i]
                if hit and self.outputs[i]:
                    self.outputs[i] = 2
        finally:
            self.release()

    def last_output(self, seq_id):
        """Batch index of the logits that follow the last token of a sequence, for ``Context.logits``.

        Raises
        ------
        LogitsUnavailableError
            The last decode did not have that sequence, or put out nothing for its last token, or the sequence has been
            changed since.
        """
        cdef size_t i, j, at = 0
        cdef long found = -1
        cdef int32_t seq
        self.enter("last_output")
        try:
            seq = self.seq(seq_id)
            for i in range(self.outputs.size()):
                for j in range(<size_t> self.output_n_seq[i]):
                    if self.output_seqs[at + j] == seq:
                        found = <long> i
                at += self.output_n_seq[i]
            if found < 0 or self.outputs[found] != 1:
                raise LogitsUnavailableError(
                    f"no logits for the last token of sequence {seq}: decode it again", index=None if found < 0 else found,
                    n_outputs=self.n_outputs,
                )
            return found
        finally:
            self.release()

    def lock_model(self):
        """Keep adapters of the model from being loaded or freed until :meth:`unlock_model`, by the same thread."""
        cdef _ModelPtr model = self._model
        if model is None:
            raise ClosedError("the context is closed", what="context")
        with nogil:
            model.adapters_lock.lock_shared()

    def unlock_model(self):
        """Undo :meth:`lock_model`."""
        self._model.adapters_lock.unlock_shared()

    def __enter__(self):
        self.enter("context")
        return self

    def __exit__(self, *exc):
        self.release()

    @property
    def closed(self):
        """Whether the context may no longer be used."""
        return self.ptr == NULL or self.close_pending or (self._alive is not None and not self._alive())

    @property
    def address(self):
        """The ``llama_context *`` as an integer; 0 when closed."""
        return <uintptr_t> self.ptr

    @property
    def has_memory(self):
        """Whether the model keeps a memory at all (encoders do not)."""
        return self.mem != NULL

    @property
    def n_threads(self):
        """Threads used for single tokens (``llama_n_threads``)."""
        self.enter("n_threads")
        try:
            return c.llama_n_threads(self.ptr)
        finally:
            self.release()

    def set_n_threads(self, int n_threads, int n_threads_batch):
        """``llama_set_n_threads``."""
        self.enter("set_n_threads")
        try:
            c.llama_set_n_threads(self.ptr, n_threads, n_threads_batch)
        finally:
            self.release()

    def close(self):
        """Free the context, after the operation that is running. Idempotent. Views of logits keep the memory."""
        # always waits: an end that can be refused would leave a with block in the middle
        cdef bint impatient = self.raise_if_busy
        self.raise_if_busy = False
        try:
            self.acquire("close")
        finally:
            self.raise_if_busy = impatient
        try:
            if self.views:
                self.close_pending = True
            else:
                self.free_now()
        finally:
            self.release()


cdef ContextHandle _wrap_context(c.llama_context * ptr, _ModelPtr model, bint raise_if_busy):
    cdef ContextHandle h = ContextHandle.__new__(ContextHandle, raise_if_busy=raise_if_busy)
    cdef const llama_model * m = c.llama_get_model(ptr)
    cdef c.llama_rope_type_enum rope = c.llama_model_rope_type(m)
    h.ptr = ptr
    h._model = model
    h.mem = c.llama_get_memory(ptr)
    h.n_ctx = <int> c.llama_n_ctx(ptr)
    h.n_ctx_seq = <int> c.llama_n_ctx_seq(ptr)
    h.n_batch = <int> c.llama_n_batch(ptr)
    h.n_ubatch = <int> c.llama_n_ubatch(ptr)
    h.n_seq_max = <int> c.llama_n_seq_max(ptr)
    h.n_rs_seq = <int> c.llama_n_rs_seq(ptr)
    h.n_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(m))
    h.n_embd_out = c.llama_model_n_embd_out(m)
    h.pooling_type = <int> c.llama_pooling_type(ptr)
    h.m_rope = rope == c.LLAMA_ROPE_TYPE_MROPE or rope == c.LLAMA_ROPE_TYPE_IMROPE
    h.causal = c.llama_get_causal_attn(ptr)
    h.recurrent = c.llama_model_is_recurrent(m)
    h.outputs_reserved = h.n_seq_max
    h.shifted = frozenset()
    h.shared = frozenset()
    h.changes = count_changes(h.n_seq_max)
    h.on_device = {}
    h.device_storage = {}
    h.adapters = ()
    return h


cdef cbool stop_at_first(c.ggml_tensor * t, cbool ask, void * user_data) noexcept nogil:
    return ask


def create_context(ModelHandle model, dict params, *, bint raise_if_busy, bint compute=True):
    """Make a context (``llama_init_from_model``). Releases the GIL.

    Parameters
    ----------
    model : ModelHandle
        Not ``vocab_only``: the caller checks.
    params : dict
        Fields of ``llama_context_params`` by name; enums as integers. Those not given keep llama.cpp's default.
    raise_if_busy : bool
        What a second thread gets: :class:`ContextBusyError`, or its turn.
    compute : bool
        False for a context that takes tokens and gives them cells, but computes next to nothing, however large the
        model: what it holds then are numbers without meaning, in the right places.

    Raises
    ------
    ContextCreateError
        With llama.cpp's own words as ``reason``.
    """
    cdef llama_model * m = model.ptr()
    cdef _ModelPtr keep = model._owned  # held by a local while the GIL is away
    cdef c.llama_context_params p = c.llama_context_default_params()
    cdef c.llama_context * ptr
    given = dict(params)
    try:
        p.n_ctx = given.pop("n_ctx", p.n_ctx)
        p.n_batch = given.pop("n_batch", p.n_batch)
        p.n_ubatch = given.pop("n_ubatch", p.n_ubatch)
        p.n_seq_max = given.pop("n_seq_max", p.n_seq_max)
        p.n_rs_seq = given.pop("n_rs_seq", 0)
        p.n_threads = given.pop("n_threads", p.n_threads)
        p.n_threads_batch = given.pop("n_threads_batch", p.n_threads_batch)
        p.rope_scaling_type = <c.llama_rope_scaling_type> <int> given.pop("rope_scaling_type", <int> p.rope_scaling_type)
        p.pooling_type = <c.llama_pooling_type_enum> <int> given.pop("pooling_type", <int> p.pooling_type)
        p.flash_attn_type = <c.llama_flash_attn_type> <int> given.pop("flash_attn_type", <int> p.flash_attn_type)
        p.rope_freq_base = given.pop("rope_freq_base", p.rope_freq_base)
        p.rope_freq_scale = given.pop("rope_freq_scale", p.rope_freq_scale)
        p.yarn_ext_factor = given.pop("yarn_ext_factor", p.yarn_ext_factor)
        p.yarn_attn_factor = given.pop("yarn_attn_factor", p.yarn_attn_factor)
        p.yarn_beta_fast = given.pop("yarn_beta_fast", p.yarn_beta_fast)
        p.yarn_beta_slow = given.pop("yarn_beta_slow", p.yarn_beta_slow)
        p.yarn_orig_ctx = given.pop("yarn_orig_ctx", p.yarn_orig_ctx)
        p.type_k = <c.ggml_type> <int> given.pop("type_k", <int> p.type_k)
        p.type_v = <c.ggml_type> <int> given.pop("type_v", <int> p.type_v)
        p.embeddings = given.pop("embeddings", p.embeddings)
        p.offload_kqv = given.pop("offload_kqv", p.offload_kqv)
        p.op_offload = given.pop("op_offload", p.op_offload)
        p.no_perf = given.pop("no_perf", p.no_perf)
        p.swa_full = given.pop("swa_full", p.swa_full)
        p.kv_unified = given.pop("kv_unified", p.kv_unified)
    except (OverflowError, TypeError) as error:
        raise ContextCreateError(f"bad context parameter: {error}", params=params, reason=str(error)) from None
    if given:
        raise ContextCreateError(f"unknown context parameters {sorted(given)}", params=params, reason="unknown parameter")
    if not compute:
        p.cb_eval = stop_at_first  # asked for after the first node, it says that this was all
    log.install(True)  # whoever was imported since may have taken the log, and with it llama.cpp's reasons
    log.clear_errors()
    try:
        with nogil:
            keep.adapters_lock.lock_shared()
            try:
                ptr = c.llama_init_from_model(m, p)
            finally:
                keep.adapters_lock.unlock_shared()
    except (RuntimeError, IndexError, MemoryError, ValueError, OverflowError) as error:
        raise ContextCreateError(f"cannot make a context: {error}", params=params, reason=str(error)) from None
    if ptr == NULL:
        reason = log.take_errors() or "llama.cpp gave no reason"
        raise ContextCreateError(f"cannot make a context: {reason}", params=params, reason=reason)
    cdef ContextHandle handle = _wrap_context(ptr, keep, raise_if_busy)
    handle.embeddings = p.embeddings
    return handle


def borrow_context(uintptr_t address, keep, alive, model_alive, *, bint raise_if_busy, bint embeddings):
    """Wrap a ``llama_context *`` that ``keep`` owns.

    Parameters
    ----------
    address : int
        The pointer.
    keep : object
        Kept alive as long as the handle.
    alive : callable
        Asked before every use whether the pointer still stands.
    model_alive : callable
        The same of the model, for whoever uses it without the context.
    """
    if address == 0 or not alive():
        raise ClosedError("the context is closed", what="context")
    cdef c.llama_context * ptr = <c.llama_context *> address
    cdef _ModelPtr model = _ModelPtr.__new__(_ModelPtr)
    model.keep = keep
    model.alive = model_alive
    model.ptr = <llama_model *> c.llama_get_model(ptr)
    cdef ContextHandle handle = _wrap_context(ptr, model, raise_if_busy)
    handle.borrowed = True
    handle.moved_cells = True  # nobody knows what its owner did
    handle.shared = frozenset(range(handle.n_seq_max))
    handle._alive = alive
    handle.embeddings = embeddings
    return handle


def closed_copy(ContextHandle h):
    """A closed handle that tells the same facts: for one of those who share ``h``, when the others go on."""
    cdef ContextHandle copy = ContextHandle.__new__(ContextHandle)
    copy.borrowed = h.borrowed
    copy.n_ctx, copy.n_ctx_seq = h.n_ctx, h.n_ctx_seq
    copy.n_batch, copy.n_ubatch = h.n_batch, h.n_ubatch
    copy.n_seq_max, copy.n_rs_seq = h.n_seq_max, h.n_rs_seq
    copy.n_vocab, copy.n_embd_out = h.n_vocab, h.n_embd_out
    copy.pooling_type = h.pooling_type
    copy.changes = h.changes
    return copy


def handle_model(ContextHandle context):
    """A :class:`ModelHandle` that shares the context's claim on its model."""
    if context._model is None:
        raise ClosedError("the context is closed", what="context")
    cdef ModelHandle handle = ModelHandle.__new__(ModelHandle)
    handle._owned = context._model
    handle.borrowed = context._model.keep is not None
    return handle


c.llama_backend_init()
