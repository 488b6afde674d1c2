# distutils: language = c++
# cython: language_level=3
"""The state functions of ``llama.h``: bytes between llama.cpp's memory and the caller's buffer, once, without the GIL.

What these check: the context is open and nobody else is inside, the sequence id and the flags exist, the buffer is
contiguous and large enough. What they do not check is what the bytes say: ``llamastate.layout`` does, before
anything gets here, and ``llamastate.restore`` sees to what can go wrong then.
"""

from cpython.number cimport PyNumber_Index
from libc.stdint cimport int32_t, uint8_t, uint32_t

from llamastate._native cimport llama as c
from llamastate._native import log
from llamastate._native.buffers cimport Pinned, pin
from llamastate._native.handles cimport ContextHandle
from llamastate.errors import BufferTooSmallError, InvalidFlagsError, LoadError, SaveError
from llamastate.words import brief

cdef uint32_t KNOWN_FLAGS = c.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY | c.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE


cdef uint32_t known(flags) except? 0xFFFFFFFF:
    cdef unsigned long n
    try:
        n = PyNumber_Index(flags)
    except (OverflowError, TypeError):
        n = ~<unsigned long> KNOWN_FLAGS
    if n & ~<unsigned long> KNOWN_FLAGS:
        raise InvalidFlagsError(f"unknown state flags {brief(flags)}", flags=flags, known=KNOWN_FLAGS)
    return <uint32_t> n


cdef int check_space(size_t needed, size_t got) except -1:
    if got < needed:
        raise BufferTooSmallError(f"the state takes {needed} bytes, the buffer has {got}", needed=needed, got=got)
    return 0


cdef object save_failed(str operation, size_t written, size_t needed):
    reason = log.take_errors() or f"llama.cpp wrote {written} of {needed} bytes"
    return SaveError(f"{operation}: {reason}", reason=reason)


def get_size(ContextHandle h):
    """``llama_state_get_size``: bytes of the whole context's state now."""
    cdef size_t n
    h.enter("state_get_size")
    try:
        with nogil:
            n = c.llama_state_get_size(h.ptr)
        return n
    finally:
        h.release()


def get_data_into(ContextHandle h, out):
    """``llama_state_get_data`` into ``out``; the number of bytes written."""
    cdef Pinned buf = pin(out, True)
    cdef size_t needed, written
    try:
        h.enter("state_get_data")
        try:
            log.clear_errors()
            with nogil:
                needed = c.llama_state_get_size(h.ptr)
            check_space(needed, <size_t> buf.view.len)
            with nogil:
                written = c.llama_state_get_data(h.ptr, <uint8_t *> buf.view.buf, needed)
            if written != needed:
                raise save_failed("state_get_data", written, needed)
            return written
        finally:
            h.release()
    finally:
        buf.release()


def set_data(ContextHandle h, src, only=None):
    """``llama_state_set_data``; the number of bytes read, 0 when llama.cpp refused.

    ``only`` is the one sequence of which the context holds something else, if the caller knows that.
    """
    cdef Pinned buf = pin(src, False)
    cdef int32_t changed = -1 if only is None else h.seq(only)
    cdef size_t n
    try:
        h.enter("state_set_data")
        try:
            log.clear_errors()
            with nogil:
                n = c.llama_state_set_data(h.ptr, <const uint8_t *> buf.view.buf, <size_t> buf.view.len)
            h.changes.note(changed if n else -1)
            h.shifted = frozenset()
            h.shared = frozenset(range(h.n_seq_max))  # a state brings along which cells were shared
            return n
        finally:
            h.release()
    finally:
        buf.release()


def check(ContextHandle h, seq_id, flags):
    """Refuse a sequence id or flags that do not exist, and a closed context."""
    h.enter("state")
    try:
        h.seq(seq_id)
        known(flags)
    finally:
        h.release()


def seq_get_size(ContextHandle h, seq_id, flags):
    """``llama_state_seq_get_size_ext``: bytes of one sequence's state now."""
    cdef int32_t seq
    cdef uint32_t f
    h.enter("state_seq_get_size")
    try:
        seq, f = h.seq(seq_id), known(flags)
        # With the GIL: it walks the cells once and copies nothing.
        return c.llama_state_seq_get_size_ext(h.ptr, seq, f)
    finally:
        h.release()


def seq_get_data_into(ContextHandle h, out, seq_id, flags, size_t at_most=0, size_t start=0):
    """``llama_state_seq_get_data_ext`` into ``out`` from ``start`` on; the number of bytes written.

    ``at_most`` is a size that the state does not exceed, if the caller knows one: it saves a walk over all cells when
    the buffer has room for that.
    """
    cdef Pinned buf = pin(out, True)
    cdef size_t needed, written
    cdef size_t room = <size_t> buf.view.len - min(start, <size_t> buf.view.len)
    cdef bint known_to_fit = 0 < at_most <= room
    cdef int32_t seq
    cdef uint32_t f
    try:
        h.enter("state_seq_get_data")
        try:
            seq, f = h.seq(seq_id), known(flags)
            log.clear_errors()
            if known_to_fit:
                needed = at_most
            else:
                with nogil:
                    needed = c.llama_state_seq_get_size_ext(h.ptr, seq, f)
                check_space(needed, room)
            with nogil:
                written = c.llama_state_seq_get_data_ext(h.ptr, <uint8_t *> buf.view.buf + start, needed, seq, f)
            if written != needed and not (known_to_fit and 0 < written < needed):
                raise save_failed("state_seq_get_data", written, needed)
            return written
        finally:
            h.release()
    finally:
        buf.release()


def seq_set_data(ContextHandle h, src, dest_seq_id, flags):
    """``llama_state_seq_set_data_ext``; the number of bytes read, 0 when llama.cpp refused."""
    cdef Pinned buf = pin(src, False)
    cdef size_t n
    cdef int32_t seq
    cdef uint32_t f
    try:
        h.enter("state_seq_set_data")
        try:
            seq, f = h.seq(dest_seq_id), known(flags)
            log.clear_errors()
            h.changes.note(seq)
            try:
                with nogil:
                    n = c.llama_state_seq_set_data_ext(
                        h.ptr, <const uint8_t *> buf.view.buf, <size_t> buf.view.len, seq, f)
            except RuntimeError as error:
                raise LoadError(f"state_seq_set_data: {error}", reason=str(error)) from None
            return n
        finally:
            h.release()
    finally:
        buf.release()


def seq_set_through(ContextHandle h, src, via, dest):
    """``llama_state_seq_set_data_ext`` into ``via``, whose cells ``dest`` then has too (``llama_memory_seq_cp``).

    The number of bytes read; where that is not all of them, ``dest`` is as it was. ``via`` loses what it held before
    and keeps its cells. Only where all sequences share the cells (``kv_unified``): elsewhere the copy would be put off.
    """
    cdef Pinned buf = pin(src, False)
    cdef size_t n
    cdef int32_t v, d
    try:
        h.enter("state_seq_set_data")
        try:
            v, d = h.seq(via), h.seq(dest)
            log.clear_errors()
            h.shared = h.shared | {v, d}
            h.changes.note(v)
            h.changes.note(d)
            try:
                with nogil:
                    n = c.llama_state_seq_set_data_ext(
                        h.ptr, <const uint8_t *> buf.view.buf, <size_t> buf.view.len, v, 0)
                    if n == <size_t> buf.view.len:
                        c.llama_memory_seq_cp(h.mem, v, d, -1, -1)
            except RuntimeError as error:
                raise LoadError(f"state_seq_set_data: {error}", reason=str(error)) from None
            return n
        finally:
            h.release()
    finally:
        buf.release()
