from cpython.buffer cimport Py_buffer


cdef class Pinned:
    """A buffer held for as long as llama.cpp may touch it."""
    cdef Py_buffer view
    cdef bint held
    cdef void release(self) noexcept


cdef Pinned pin(obj, bint writable)
