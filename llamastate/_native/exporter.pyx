# distutils: language = c++
# cython: language_level=3
"""The buffer protocol for classes written in Python, which have no other way to it before Python 3.12."""

from cpython.buffer cimport (
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyObject_GetBuffer,
)
from libc.string cimport memmove, memset

from llamastate._native.buffers cimport Pinned, pin
from llamastate.errors import BufferTooSmallError


# From so many bytes on it is worth letting others have the GIL while they are copied.
cdef Py_ssize_t LARGE = 1 << 16


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
        self.held = pin(obj, writable)
        self.writable = writable
        self.source = obj
        try:
            self.resize(length)
        except BaseException:
            self.release()
            raise

    def resize(self, Py_ssize_t length):
        """Show another number of bytes.

        Raises
        ------
        BufferTooSmallError
            The buffer has fewer.
        BufferError
            Views are out, or it has been released.
        """
        self.check_free()
        if not 0 <= length <= self.held.view.len:
            got = self.held.view.len
            raise BufferTooSmallError(f"the buffer has {got} bytes, not {length}", needed=length, got=got)
        self.length = length

    def write(self, Py_ssize_t at, obj, Py_ssize_t end):
        """Copy a buffer to ``at``, and zeros from where it ends to ``end``.

        Raises
        ------
        ValueError
            It does not fit between ``at`` and ``end``, or these are not inside.
        BufferError
            Read-only, or released.
        """
        cdef Pinned src
        cdef char * place
        cdef Py_ssize_t n
        if self.held is None or not self.writable:
            raise BufferError("the buffer is read-only" if self.held is not None else "the buffer has been released")
        src = pin(obj, False)
        try:
            n = src.view.len
            if not 0 <= at <= end <= self.length or n > end - at:
                raise ValueError(f"{n} bytes at {at} do not end before {end}, in a span of {self.length}")
            place = <char *> self.held.view.buf + at
            if n < LARGE:
                memmove(place, src.view.buf, n)
            else:
                self.views += 1  # nobody may release it meanwhile
                with nogil:
                    memmove(place, src.view.buf, n)
                self.views -= 1
            memset(place + n, 0, end - at - n)
        finally:
            src.release()

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

    cdef int check_free(self) except -1:
        if self.views:
            raise BufferError(f"{self.views} views of it are still in use")
        if self.held is None:
            raise BufferError("the buffer has been released")
        return 0

    def release(self):
        """Give the buffer back. Idempotent.

        Raises
        ------
        BufferError
            Views are out.
        """
        if self.held is not None:
            self.check_free()
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
