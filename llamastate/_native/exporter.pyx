# distutils: language = c++
# cython: language_level=3
"""The buffer protocol for classes written in Python, which have no other way to it before Python 3.12."""

from cpython.buffer cimport (
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyObject_GetBuffer,
)

from llamastate._native.buffers cimport Pinned, pin
from llamastate.errors import BufferTooSmallError


cdef class Span:
    """The first bytes of somebody's buffer, held, and how many views of them are out.

    Parameters
    ----------
    obj : buffer
        Contiguous. Held until :meth:`release`.
    length : int
        Bytes that are shown; at most as many as the buffer has.
    writable : bool
        Whether views may write. Fails for a buffer that is read-only.
    """
    cdef Pinned held
    cdef Py_ssize_t length
    cdef readonly bint writable
    cdef readonly Py_ssize_t views
    cdef readonly object source

    def __init__(self, obj, Py_ssize_t length, bint writable):
        cdef Pinned held = pin(obj, writable)
        if not 0 <= length <= held.view.len:
            got = held.view.len
            held.release()
            raise BufferTooSmallError(f"the buffer has {got} bytes, not {length}", needed=length, got=got)
        self.held = held
        self.length = length
        self.writable = writable
        self.source = obj

    @property
    def nbytes(self):
        """Bytes that are shown."""
        return self.length

    @property
    def capacity(self):
        """Bytes of the buffer."""
        return 0 if self.held is None else self.held.view.len

    @property
    def released(self):
        """Whether the buffer has been given back."""
        return self.held is None

    @property
    def address(self):
        """Where the bytes lie, 0 once released."""
        return 0 if self.held is None else <size_t> self.held.view.buf

    def release(self):
        """Give the buffer back. Idempotent.

        Raises
        ------
        BufferError
            Views are out.
        """
        if self.views:
            raise BufferError(f"{self.views} views of it are still in use")
        if self.held is not None:
            self.held.release()
            self.held = None
            self.source = None

    def __getbuffer__(self, Py_buffer * buffer, int flags):
        if self.held is None:
            raise BufferError("the buffer has been released")
        if flags & PyBUF_WRITABLE and not self.writable:
            raise BufferError("the buffer is read-only")
        PyBuffer_FillInfo(buffer, self, self.held.view.buf, self.length, not self.writable, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer * buffer):
        self.views -= 1


cdef class Exporter:
    """Base of classes that are buffers: what ``_exported`` returns is what a view of them shows, read-only."""

    def _exported(self):
        """The object whose bytes are shown."""
        raise NotImplementedError

    def __getbuffer__(self, Py_buffer * buffer, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError(f"{type(self).__name__} is read-only")
        PyObject_GetBuffer(self._exported(), buffer, flags)
        buffer.readonly = True
