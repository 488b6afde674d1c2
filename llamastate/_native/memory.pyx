# distutils: language = c++
# cython: language_level=3
"""``llama_memory_*``: which cells belong to which sequence. Checked, locked, and nothing else.

Whether an operation keeps a sequence exact is not decided here: llama.cpp says yes in cases where it does not
(see ``llamastate.sequences``).
"""

from cpython.number cimport PyNumber_Index
from libc.stdint cimport int32_t

from llamastate._native cimport llama as c
from llamastate._native.handles cimport ContextHandle
from llamastate.errors import InvalidPositionError

cdef int32_t MAX_POS = 2147483647


cdef int32_t position(str what, value) except? -2:
    try:
        value = PyNumber_Index(value)
    except TypeError:
        raise InvalidPositionError(
            f"{what} is {type(value).__name__}, not an integer", reason=what, value=value, limit=MAX_POS) from None
    # llama.h: p0 < 0 means from the start, p1 < 0 to the end; one negative number is as good as another
    if not -MAX_POS <= value <= MAX_POS:
        raise InvalidPositionError(f"{what} = {value} does not fit 32 bits", reason=what, value=value, limit=MAX_POS)
    return <int32_t> value if value >= 0 else -1


def clear(ContextHandle h, bint data):
    """``llama_memory_clear``."""
    h.enter("clear")
    try:
        with nogil:
            c.llama_memory_clear(h.mem, data)
        h.changes.note(-1)
        h.shifted = h.shared = frozenset()
        h.moved_cells = h.borrowed
    finally:
        h.release()


def seq_rm(ContextHandle h, seq_id, p0, p1):
    """``llama_memory_seq_rm``; its own answer, which is not always the truth."""
    cdef int32_t seq, a, b
    cdef bint done
    h.enter("seq_rm")
    try:
        seq, a, b = h.seq(seq_id), position("p0", p0), position("p1", p1)
        done = h.mem == NULL or c.llama_memory_seq_rm(h.mem, seq, a, b)
        if done:
            h.changes.note(seq)
        if done and a <= 0 and b < 0:
            h.shifted = h.shifted - {seq}
            h.shared = h.shared - {seq}
        return done
    finally:
        h.release()


def seq_cp(ContextHandle h, src, dst, p0, p1):
    """``llama_memory_seq_cp``. When not unified: whole sequences only, and deferred to the next decode."""
    cdef int32_t s, d, a, b
    h.enter("seq_cp")
    try:
        s, d, a, b = h.seq(src), h.seq(dst), position("p0", p0), position("p1", p1)
        if h.mem != NULL and s != d:
            c.llama_memory_seq_cp(h.mem, s, d, a, b)
            h.changes.note(d)
            h.shared = h.shared | {s, d}
            if s in h.shifted:
                h.shifted = h.shifted | {d}
    finally:
        h.release()


def seq_keep(ContextHandle h, seq_id):
    """``llama_memory_seq_keep``."""
    cdef int32_t seq
    h.enter("seq_keep")
    try:
        seq = h.seq(seq_id)
        if h.mem != NULL:
            c.llama_memory_seq_keep(h.mem, seq)
            h.changes.note_all([other for other in range(h.n_seq_max) if other != seq])
    finally:
        h.release()


cdef int note_moved(ContextHandle h, int32_t seq) except -1:
    h.changes.note(seq)
    h.moved_cells = True
    if not h.recurrent:
        h.shifted = h.shifted | {seq}
    return 0


def seq_add(ContextHandle h, seq_id, p0, p1, long delta):
    """``llama_memory_seq_add``. The caller has asked :func:`can_shift` and knows that no position goes negative."""
    cdef int32_t seq, a, b
    h.enter("seq_add")
    try:
        seq, a, b = h.seq(seq_id), position("p0", p0), position("p1", p1)
        if h.mem != NULL:
            c.llama_memory_seq_add(h.mem, seq, a, b, <int32_t> delta)
            note_moved(h, seq)
    finally:
        h.release()


def seq_div(ContextHandle h, seq_id, p0, p1, int d):
    """``llama_memory_seq_div``. The caller has asked :func:`can_shift` and knows that ``d >= 1``."""
    cdef int32_t seq, a, b
    h.enter("seq_div")
    try:
        seq, a, b = h.seq(seq_id), position("p0", p0), position("p1", p1)
        if h.mem != NULL:
            c.llama_memory_seq_div(h.mem, seq, a, b, d)
            note_moved(h, seq)
    finally:
        h.release()


def seq_pos_min(ContextHandle h, seq_id):
    """``llama_memory_seq_pos_min``; -1 for an empty sequence."""
    cdef int32_t seq
    h.enter("seq_pos_min")
    try:
        seq = h.seq(seq_id)
        return -1 if h.mem == NULL else c.llama_memory_seq_pos_min(h.mem, seq)
    finally:
        h.release()


def seq_pos_max(ContextHandle h, seq_id):
    """``llama_memory_seq_pos_max``; -1 for an empty sequence."""
    cdef int32_t seq
    h.enter("seq_pos_max")
    try:
        seq = h.seq(seq_id)
        return -1 if h.mem == NULL else c.llama_memory_seq_pos_max(h.mem, seq)
    finally:
        h.release()


def can_shift(ContextHandle h):
    """``llama_memory_can_shift``."""
    h.enter("can_shift")
    try:
        return h.mem != NULL and c.llama_memory_can_shift(h.mem)
    finally:
        h.release()
