# distutils: language = c++
# cython: language_level=3
"""Other people's memory, pinned.

The ``Py_buffer`` is held over the whole C call, not only until the pointer is known: while it is held a bytearray
cannot be resized and an mmap cannot be closed under llama.cpp's hands, although the GIL is free.
"""

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from libc.string cimport strchr

from llamastate.errors import InvalidBufferError


cdef class Pinned:
    cdef void release(self) noexcept:
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def __dealloc__(self):
        self.release()


cdef Pinned pin(obj, bint writable):
    cdef Pinned pinned = Pinned.__new__(Pinned)
    kind = type(obj).__name__
    if not PyObject_CheckBuffer(obj):
        raise InvalidBufferError(
            f"{kind} has no buffer protocol", reason="no buffer protocol", type=kind
        )
    cdef int access = PyBUF_WRITABLE if writable else 0
    try:
        try:
            PyObject_GetBuffer(obj, &pinned.view, PyBUF_ND | PyBUF_FORMAT | access)
        except ValueError:
            # NumPy knows no format for some dtypes (dates, bfloat16), and bytes they are all the same
            PyObject_GetBuffer(obj, &pinned.view, PyBUF_SIMPLE | access)
    except (BufferError, ValueError, TypeError) as error:
        # exporters word this each in their own way; what matters is which of our two demands was not met
        reason = "read-only or not contiguous" if writable else "not contiguous"
        raise InvalidBufferError(f"{kind} cannot be used as a buffer ({reason}): {error}", reason=reason, type=kind) from None
    pinned.held = True
    if pinned.view.format != NULL and strchr(pinned.view.format, b'O') != NULL:
        # an array of Python objects: bytes written over the pointers would crash the interpreter some time later
        raise InvalidBufferError(f"{kind} holds Python objects, not bytes", reason="holds objects", type=kind)
    return pinned
