# distutils: language = c++
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Batches in, logits and embeddings out (``llama_decode`` and what it leaves behind).

Everything that llama.cpp would assert on, or would accept and get wrong, is checked before it sees the batch.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libc.string cimport memcpy, memset
from libcpp.vector cimport vector

from llamastate._native cimport llama as c
from llamastate._native import log
from llamastate._native.handles cimport ContextHandle, _ModelPtr
from llamastate.errors import (
    ContextBusyError,
    DecodeAbortedError,
    DecodeError,
    InvalidBatchError,
    LogitsUnavailableError,
    NoKVSlotError,
)

# As many as LLAMA_MAX_SEQ in llama.cpp; n_seq_max cannot be larger.
cdef enum:
    MAX_SEQ = 256


cdef object bad(str reason, int n_tokens, index=None, value=None, limit=None):
    where = "" if index is None else f" at index {index}"
    return InvalidBatchError(
        f"invalid batch{where}: {reason}", code=-1, n_tokens=n_tokens, reason=reason, index=index, value=value, limit=limit
    )


cdef int check_batch(ContextHandle h, int n, const int32_t * tokens, const int32_t * pos, const int32_t * n_seq_id,
                     const int32_t * seq_ids, Py_ssize_t n_flat) except -1:
    cdef int32_t expected[MAX_SEQ]
    cdef int64_t seen[MAX_SEQ]
    cdef int i, j, s
    cdef Py_ssize_t at = 0
    cdef int limit = h.n_batch
    if n < 1:
        raise bad("it is empty", n)
    if h.mem == NULL or not h.causal:
        # without a memory, or without a causal mask, everything has to fit one physical batch
        limit = min(limit, h.n_ubatch)
    if n > limit:
        raise bad(f"{n} tokens are more than {'n_batch' if limit == h.n_batch else 'n_ubatch'} = {limit}", n,
                  None, n, limit)
    for s in range(MAX_SEQ):
        expected[s] = -1
        seen[s] = -1
    for i in range(n):
        if tokens[i] < 0 or tokens[i] >= h.n_vocab:
            raise bad(f"token id {tokens[i]} is not in [0, {h.n_vocab})", n, i, tokens[i], h.n_vocab)
        if n_seq_id[i] < 1 or at + n_seq_id[i] > n_flat:
            raise bad("it belongs to no sequence, or the lists of sequence ids are too short", n, i, n_seq_id[i])
        if n_seq_id[i] > 1 and h.mem != NULL and h.n_ctx_seq != h.n_ctx:
            raise bad("a token can only belong to several sequences when the cache is unified", n, i, n_seq_id[i], 1)
        if n_seq_id[i] > 1 and h.recurrent:
            raise bad("a recurrent model takes no token for several sequences; copy the sequence afterwards", n, i,
                      n_seq_id[i], 1)
        for j in range(n_seq_id[i]):
            s = seq_ids[at + j]
            if s < 0 or s >= h.n_seq_max:
                raise bad(f"sequence id {s} is not in [0, {h.n_seq_max})", n, i, s, h.n_seq_max)
            if seen[s] == i:
                raise bad(f"sequence id {s} is given twice", n, i, s)
            if seen[s] == -1:
                expected[s] = 0 if h.mem == NULL else c.llama_memory_seq_pos_max(h.mem, s) + 1
            if pos[i] == 2147483647:  # which llama.cpp uses as the end of everything, and could never remove
                raise bad("the last position is never reached", n, i, pos[i], 2147483647)
            if h.m_rope and expected[s] > 0 and pos[i] > expected[s]:
                expected[s] = pos[i]  # positions of M-RoPE models may jump forward (images span several)
            if pos[i] != expected[s]:
                raise bad(f"position {pos[i]} of sequence {s} does not follow; {expected[s]} does", n, i, pos[i], expected[s])
            expected[s] = pos[i] + 1
            seen[s] = i
        at += n_seq_id[i]
    if at != n_flat:
        raise bad("there are more sequence ids than tokens ask for", n, None, n_flat, at)
    return 0


cdef void note_changed(ContextHandle h, const int32_t[::1] seq_ids) noexcept:
    cdef int8_t noted[MAX_SEQ]
    cdef Py_ssize_t i
    memset(noted, 0, sizeof(noted))
    for i in range(seq_ids.shape[0]):
        if not noted[seq_ids[i]]:
            noted[seq_ids[i]] = 1
            h.changes.note(seq_ids[i])


cdef object decode_failed(int code, int n):
    reason = log.take_errors()
    tail = f": {reason}" if reason else ""
    if code == 1:
        return NoKVSlotError(f"no room in the cache for {n} tokens", code=code, n_tokens=n)
    if code == 2:
        return DecodeAbortedError(f"decoding {n} tokens was aborted", code=code, n_tokens=n)
    if code == -1:
        return bad(reason or "llama.cpp refused it", n)
    return DecodeError(f"llama_decode returned {code} for {n} tokens{tail}", code=code, n_tokens=n)


def decode(ContextHandle h, const int32_t[::1] tokens, const int32_t[::1] pos, const int32_t[::1] n_seq_id,
           const int32_t[::1] seq_ids, const int8_t[::1] outputs):
    """``llama_decode``, checked. Releases the GIL.

    Parameters
    ----------
    tokens, pos, n_seq_id : int32[n]
        Token ids, positions, and how many sequences each token belongs to.
    seq_ids : int32[sum(n_seq_id)]
        Sequence ids, those of token 0 first.
    outputs : int8[n]
        Non-zero where logits (and embeddings) are wanted.

    Returns
    -------
    int
        How many outputs there are.
    """
    cdef int n = <int> tokens.shape[0]
    cdef int i, n_out = 0, code
    cdef Py_ssize_t at = 0
    cdef vector[c.llama_seq_id *] rows
    cdef vector[int8_t] flags
    cdef int8_t wanted
    cdef c.llama_batch batch
    cdef _ModelPtr model
    if pos.shape[0] != n or n_seq_id.shape[0] != n or outputs.shape[0] != n:
        raise bad("its arrays differ in length", n)
    h.enter("decode")
    try:
        if n == 0:
            raise bad("it is empty", 0)
        check_batch(h, n, &tokens[0], &pos[0], &n_seq_id[0], &seq_ids[0] if seq_ids.shape[0] else NULL, seq_ids.shape[0])
        rows.reserve(n)
        flags.reserve(n)
        for i in range(n):
            rows.push_back(<c.llama_seq_id *> &seq_ids[at])
            at += n_seq_id[i]
            # a context that makes embeddings puts out every token whatever the mask says; say so instead of a warning
            wanted = outputs[i] != 0 or h.embeddings or h.mem == NULL
            flags.push_back(wanted)
            n_out += wanted
        if h.views and n_out > h.outputs_reserved:
            raise ContextBusyError(
                f"decode: {h.views} views of logits are held and {n_out} outputs would move them", operation="decode"
            )
        batch.n_tokens = n
        batch.token = <c.llama_token *> &tokens[0]
        batch.embd = NULL
        batch.pos = <c.llama_pos *> &pos[0]
        batch.n_seq_id = <int32_t *> &n_seq_id[0]
        batch.seq_id = rows.data()
        batch.logits = flags.data()
        h.n_outputs = 0
        h.epoch += 1
        h.outputs.clear()
        log.clear_errors()
        model = h._model
        try:
            with nogil:
                model.adapters_lock.lock_shared()
                try:
                    code = c.llama_decode(h.ptr, batch)
                    if code == 0:
                        # a GPU still computes; its errors and its time belong to this call
                        c.llama_synchronize(h.ptr)
                finally:
                    model.adapters_lock.unlock_shared()
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            note_changed(h, seq_ids)
            raise DecodeError(f"decoding {n} tokens: {error}", code=-3, n_tokens=n) from None
        if code != 1 and code != -1:  # of these llama.cpp says that nothing has changed
            note_changed(h, seq_ids)
        h.outputs_reserved = max(h.outputs_reserved, n_out)
        if code >= 0:  # llama.cpp rotates what was moved before it looks for room
            h.shifted = frozenset()
        if code != 0:
            raise decode_failed(code, n)
        h.outputs.swap(flags)
        h.output_n_seq.assign(&n_seq_id[0], &n_seq_id[0] + n)
        h.output_seqs.assign(&seq_ids[0], &seq_ids[0] + seq_ids.shape[0])
        h.n_outputs = n_out
        if seq_ids.shape[0] > n:
            h.shared = h.shared.union([seq_ids[i] for i in range(seq_ids.shape[0])])
        return n_out
    finally:
        h.release()


def logits_into(ContextHandle h, long i, float[::1] out):
    """Copy a row of logits (``llama_get_logits_ith``) into ``out``, float32[n_vocab]."""
    cdef float * row
    if out.shape[0] != h.n_vocab:
        raise ValueError(f"out has {out.shape[0]} elements, not n_vocab = {h.n_vocab}")
    h.enter("logits")
    try:
        row = c.llama_get_logits_ith(h.ptr, h.output(i))
        if row == NULL:
            raise LogitsUnavailableError(f"no logits for index {i}", index=i, n_outputs=h.n_outputs)
        memcpy(&out[0], row, <size_t> h.n_vocab * sizeof(float))
    finally:
        h.release()


def embeddings_into(ContextHandle h, long i, float[::1] out):
    """Copy a row of token embeddings (``llama_get_embeddings_ith``) into ``out``, float32[n_embd_out]."""
    cdef float * row
    if out.shape[0] != h.n_embd_out:
        raise ValueError(f"out has {out.shape[0]} elements, not n_embd_out = {h.n_embd_out}")
    h.enter("embeddings")
    try:
        row = c.llama_get_embeddings_ith(h.ptr, h.output(i))
        if row == NULL:
            raise LogitsUnavailableError(f"no embeddings for index {i}", index=i, n_outputs=h.n_outputs)
        memcpy(&out[0], row, <size_t> h.n_embd_out * sizeof(float))
    finally:
        h.release()


def embeddings_seq_into(ContextHandle h, seq_id, float[::1] out):
    """Copy a sequence's pooled embedding (``llama_get_embeddings_seq``) into ``out``.

    ``out`` is float32[n_embd_out], or float32[n_cls_out] when the pooling type is rank: the caller knows which.
    """
    cdef float * row
    cdef int32_t seq
    h.enter("embeddings_seq")
    try:
        seq = h.seq(seq_id)
        h.last_output(seq)  # refuses what belongs to a state that has been changed since
        row = c.llama_get_embeddings_seq(h.ptr, seq)
        if row == NULL:
            raise LogitsUnavailableError(f"no pooled embedding for sequence {seq}", index=seq, n_outputs=h.n_outputs)
        memcpy(&out[0], row, <size_t> out.shape[0] * sizeof(float))
    finally:
        h.release()


cdef class LogitsView:
    """A row of logits where llama.cpp keeps it, through the buffer protocol: float32[n_vocab], read-only.

    The context's memory lives at least as long as the view. Its contents change with the next decode, and a decode
    that would move them (more outputs than ever before) is refused while the view lives.
    """

    cdef ContextHandle h
    cdef float * row

    def __init__(self, ContextHandle h, long i):
        h.enter("logits")
        try:
            self.row = c.llama_get_logits_ith(h.ptr, h.output(i))
            if self.row == NULL:
                raise LogitsUnavailableError(f"no logits for index {i}", index=i, n_outputs=h.n_outputs)
            self.h = h
            h.views += 1
        finally:
            h.release()

    def __getbuffer__(self, Py_buffer * buffer, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("logits are read-only")
        PyBuffer_FillInfo(buffer, self, self.row, <Py_ssize_t> self.h.n_vocab * <Py_ssize_t> sizeof(float), 1, flags)

    def __dealloc__(self):
        # NumPy holds a reference to the view, not the other way round: this runs when the last array is gone
        if self.h is not None:
            self.h.views -= 1
            if self.h.close_pending and not self.h.views:
                self.h.free_now()
