"""Reading and writing little-endian bytes with every claim checked first.

A :class:`Cursor` never trusts a count: it compares what is asked for with what is left, in Python integers that
cannot overflow, and raises :class:`~llamastate.errors.CorruptStateError` with the offset and the section otherwise.
A :class:`Writer` is its mirror image over a buffer whose size has been computed beforehand.
"""

from __future__ import annotations

from struct import Struct
from traceback import clear_frames
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from llamastate.arrays import as_bytes_view
from llamastate.errors import BufferTooSmallError, CorruptStateError, InvalidBufferError

__all__ = ["Borrowed", "Cursor", "Writer", "byte_view", "writable_bytes"]

_U32 = Struct("<I")
_I32 = Struct("<i")
_U64 = Struct("<Q")


def byte_view(buf: Any) -> memoryview:
    """Any object with the buffer protocol as a flat, read-only view of bytes. No copy.

    Raises
    ------
    InvalidBufferError
        ``buf`` has no buffer protocol or is not C-contiguous.
    """
    return as_bytes_view(buf).toreadonly()


class Borrowed:
    """Use a buffer as :func:`byte_view` gives it, and let go of it if that fails.

    An exception keeps the frames it passed through, and those hold arrays over the buffer. Whoever catches it may want
    to close the mapped file or resize the bytearray at once, so the frames are emptied here. After success the arrays
    that were made keep the buffer, as they must.
    """

    __slots__ = ("view",)

    def __init__(self, buf: object) -> None:
        self.view = byte_view(buf)

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        cause: BaseException | None = error
        while cause is not None:
            clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        self.view.release()


def writable_bytes(out: Any, needed: int) -> NDArray[np.uint8]:
    """The first ``needed`` bytes of a writable buffer as ``uint8[needed]``. No copy.

    Raises
    ------
    InvalidBufferError
        No buffer protocol, not C-contiguous, or read-only.
    BufferTooSmallError
        Fewer than ``needed`` bytes.
    """
    try:
        view = memoryview(out)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidBufferError(f"not a buffer: {error}", reason=str(error), type=type(out).__name__) from None
    if view.readonly:
        raise InvalidBufferError("the buffer is read-only", reason="read-only", type=type(out).__name__)
    if not view.c_contiguous:
        raise InvalidBufferError("the buffer is not C-contiguous", reason="not contiguous", type=type(out).__name__)
    if view.nbytes < needed:
        message = f"{needed} bytes are needed, the buffer has {view.nbytes}"
        raise BufferTooSmallError(message, needed=needed, got=view.nbytes)
    if not view.nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(view.cast("B"), np.uint8, needed)


class Cursor:
    """A position in a blob that only moves over bytes that are there.

    Parameters
    ----------
    view : memoryview
        Flat bytes, as :func:`byte_view` gives them.
    at : int
        Where to start.
    """

    __slots__ = ("at", "size", "view")

    def __init__(self, view: memoryview, at: int = 0) -> None:
        self.view = view
        self.at = at
        self.size = len(view)

    @property
    def remaining(self) -> int:
        """Bytes from here to the end (0 when a walk over rows has run past it)."""
        return max(0, self.size - self.at)

    def u32(self, section: str) -> int:
        """Read one uint32."""
        return int(_U32.unpack_from(self.view, self.claim(4, section))[0])

    def i32(self, section: str) -> int:
        """Read one int32."""
        return int(_I32.unpack_from(self.view, self.claim(4, section))[0])

    def u64(self, section: str) -> int:
        """Read one uint64."""
        return int(_U64.unpack_from(self.view, self.claim(8, section))[0])

    def words(self, count: int, section: str) -> NDArray[np.int32]:
        """Read ``int32[count]`` without copying."""
        at = self.claim(4 * count, section)
        return np.frombuffer(self.view, "<i4", count, at)

    def claim(self, count: int, section: str) -> int:
        """Step over ``count`` bytes and return where they begin."""
        at = self.at
        end = at + count
        if end > self.size:
            self.truncated(section, count)
        self.at = end
        return at

    def truncated(self, section: str, count: int) -> NoReturn:
        """Raise: ``section`` needs ``count`` bytes from here and the buffer ends first."""
        left = self.size - self.at
        self.fail(section, f"truncated: {count} bytes are needed here and {max(0, left)} are left")

    def fail(self, section: str, reason: str, offset: int | None = None) -> NoReturn:
        """Raise :class:`CorruptStateError` at ``offset`` (default: here, never past the end)."""
        where = min(self.at, self.size) if offset is None else offset
        raise CorruptStateError(
            f"corrupt state at byte {where} ({section}): {reason}", reason=reason, offset=where, section=section
        )


class Writer:
    """Fills a buffer of the right size from front to back.

    Parameters
    ----------
    out : uint8[n]
        Where to write; the caller has computed ``n``.
    """

    __slots__ = ("at", "out")

    def __init__(self, out: NDArray[np.uint8]) -> None:
        self.out = out
        self.at = 0

    def put(self, data: bytes) -> None:
        """Write ``data`` and step over it."""
        end = self.at + len(data)
        self.out[self.at : end] = np.frombuffer(data, np.uint8)
        self.at = end

    def u32(self, value: int) -> None:
        """Write one uint32."""
        self.put(_U32.pack(value))

    def room(self, count: int) -> NDArray[np.uint8]:
        """Step over ``count`` bytes and return them, to be filled by the caller."""
        at = self.at
        self.at = at + count
        return self.out[at : self.at]
