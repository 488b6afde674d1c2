"""What is stored under one key, as bytes: the image of a file, and the same in memory.

All numbers are little-endian, sections begin at multiples of 64 bytes with zeros between, and follow each other in
this order::

    0    u8[8]   magic 89 'LLBLK' 0d 0a
    8    u32     version (1)
    12   u32     kind: 1 block, 2 anchor
    16   u64     total bytes
    24   u32     start: how many tokens come before
    28   u32     tail: how many tokens are in here
    32   u8[32]  key                              (llamastate.prefix.chain)
    64   u8[32]  parent: the key of the block before
    96   u8[32]  root
    128  u64[4]  bytes of tokens, rows, partial, logits; 0 for one that is not there
    160  u8[16]  XXH3-128 of each of the four (of nothing where there is none)
    224  u8[16]  XXH3-128 of the 224 bytes before
    240  u8[16]  zeros
    256  tokens  int32[tail]
         rows    sequence blob with the attention rows of those tokens, every other part of it empty
         partial PARTIAL_ONLY blob at ``start + tail`` tokens: what cannot be cut            (anchors only)
         logits  float32[n_vocab] after the last token                                       (anchors, if known)

Whatever the bytes, :func:`read` gives an entry whose sections lie inside them and hold what the checksums say, or a
typed error.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llamastate.arrays import Int32Array
from llamastate.errors import BadMagicError, CorruptStateError, VersionMismatchError

__all__ = ["HEADER_BYTES", "VERSION", "Entry", "Kind", "build", "read", "read_header", "seal"]

MAGIC = b"\x89LLBLK\r\n"
VERSION = 1
ALIGNMENT = 64
HEADER_BYTES = 256

_HEADER = struct.Struct("<8sIIQII32s32s32s4Q16s16s16s16s16s16s")
_CHECKED = 224
_SUMS = 160
assert _HEADER.size == HEADER_BYTES

_SECTIONS = ("tokens", "rows", "partial", "logits")


class Kind(IntEnum):
    """What an entry is."""

    BLOCK = 1
    ANCHOR = 2


@dataclass(eq=False)
class Entry:
    """One entry as views of its image.

    Attributes
    ----------
    kind : Kind
    key, parent, root : bytes
    start, tail : int
        The tokens ``[start, start + tail)`` are in here.
    image : uint8[n]
        The whole of it.
    bounds : tuple of (int, int)
        Offset and length of tokens, rows, partial, logits.
    fits : object
        For what its rows were found sound. The image does not change, so once is enough.
    """

    kind: Kind
    key: bytes
    parent: bytes
    root: bytes
    start: int
    tail: int
    image: npt.NDArray[np.uint8]
    bounds: tuple[tuple[int, int], ...]
    fits: object = None

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return self.image.nbytes

    @property
    def end(self) -> int:
        """How many tokens a sequence holds that this entry ends."""
        return self.start + self.tail

    @property
    def sealed(self) -> bool:
        """Whether the checksums in the image are filled in."""
        return bool(self.image[_CHECKED : _CHECKED + 16].any())

    def _section(self, i: int) -> npt.NDArray[np.uint8]:
        at, length = self.bounds[i]
        return self.image[at : at + length]

    @property
    def tokens(self) -> Int32Array:
        """The tokens in here, int32[tail]."""
        return self._section(0).view("<i4")

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """Sequence blob of the attention rows, uint8[n]; empty if there are none."""
        return self._section(1)

    @property
    def partial(self) -> npt.NDArray[np.uint8]:
        """``PARTIAL_ONLY`` blob, uint8[n]; empty if there is none."""
        return self._section(2)

    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """What followed the last token, float32[n_vocab], if it is known."""
        return self._section(3).view("<f4") if self.bounds[3][1] else None


def size_of(lengths: Sequence[int]) -> int:
    """Bytes of an entry whose four sections have these lengths."""
    return _places(lengths)[1]


def _places(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    at = HEADER_BYTES
    bounds = []
    for length in lengths:
        start = -(-at // ALIGNMENT) * ALIGNMENT if length else at
        bounds.append((start, length))
        at = start + length
    return bounds, at


def build(
    kind: Kind,
    *,
    key: bytes,
    parent: bytes,
    root: bytes,
    start: int,
    tokens: Int32Array,
    rows: int | npt.NDArray[np.uint8] = 0,
    partial: npt.NDArray[np.uint8] | None = None,
    logits: npt.NDArray[np.float32] | None = None,
) -> Entry:
    """Lay out an entry, not yet sealed.

    Parameters
    ----------
    rows : int or uint8[n]
        The blob to copy, or how many bytes to leave room for: the caller fills :attr:`Entry.rows` then.
    """
    sources: list[Any] = [
        np.ascontiguousarray(tokens, "<i4").view(np.uint8),
        None if isinstance(rows, int) else rows,
        partial,
        None if logits is None else np.ascontiguousarray(logits, "<f4").view(np.uint8),
    ]
    lengths = [0 if s is None else s.nbytes for s in sources]
    if isinstance(rows, int):
        lengths[1] = rows
    bounds, total = _places(lengths)
    image = np.empty(total, np.uint8)
    at = HEADER_BYTES
    for (offset, length), source in zip(bounds, sources, strict=True):
        image[at:offset] = 0
        if source is not None:
            image[offset : offset + length] = source
        at = offset + length
    nothing = bytes(16)
    header = (MAGIC, VERSION, kind, total, start, len(tokens), key, parent, root, *lengths)
    _HEADER.pack_into(image.data, 0, *header, nothing, nothing, nothing, nothing, nothing, nothing)
    return Entry(kind, key, parent, root, start, len(tokens), image, tuple(bounds))


def seal(entry: Entry) -> None:
    """Fill the checksums in. Reads every byte once; the GIL is free meanwhile."""
    for i, (offset, length) in enumerate(entry.bounds):
        digest = xxhash.xxh3_128_digest(entry.image[offset : offset + length].data)
        entry.image[_SUMS + 16 * i : _SUMS + 16 * (i + 1)] = np.frombuffer(digest, np.uint8)
    digest = xxhash.xxh3_128_digest(entry.image[:_CHECKED].data)
    entry.image[_CHECKED : _CHECKED + 16] = np.frombuffer(digest, np.uint8)


def read_header(image: Any) -> Entry:
    """Take the header apart, without a look at what the sections hold.

    Parameters
    ----------
    image : buffer
        All of the file, or at least its first :data:`HEADER_BYTES` (the sections are not there then).

    Raises
    ------
    BadMagicError, VersionMismatchError, CorruptStateError
        No entry, one of a newer version, a damaged one.
    """
    data = np.frombuffer(image, np.uint8)
    if data.nbytes < HEADER_BYTES:
        raise _corrupt("header", f"it ends after {data.nbytes} bytes")
    magic, version, kind, total, start, tail, key, parent, root, *rest = _HEADER.unpack_from(data.data, 0)
    if magic != MAGIC:
        raise BadMagicError(
            f"not a block: it begins with {magic!r}",
            reason="magic",
            expected=int.from_bytes(MAGIC, "little"),
            found=int.from_bytes(magic, "little"),
        )
    if xxhash.xxh3_128_digest(data[:_CHECKED].data) != rest[8]:
        raise _corrupt("header", "the checksum of the header is wrong")
    if version != VERSION or kind not in (Kind.BLOCK, Kind.ANCHOR):
        raise VersionMismatchError(
            f"a block of format version {version}, kind {kind}; this package reads version {VERSION}",
            reason="format version",
            expected=VERSION,
            found=version,
        )
    bounds, end = _places(rest[:4])
    if end != total or rest[0] != 4 * tail or rest[3] % 4:
        raise _corrupt("header", f"sections of {rest[:4]} bytes do not make {total}")
    return Entry(Kind(kind), key, parent, root, start, tail, data, tuple(bounds))


def read(image: Any) -> Entry:
    """Take an entry apart and verify every byte of it.

    Parameters
    ----------
    image : buffer
        The whole file; it must not change any more.

    Raises
    ------
    BadMagicError, VersionMismatchError, CorruptStateError
        ``section`` says which part.
    """
    entry = read_header(image)
    end = sum(entry.bounds[-1])
    if entry.nbytes != end:
        raise _corrupt("end", f"{entry.nbytes} bytes, not {end}")
    data = entry.image.data
    sums = bytes(data[_SUMS:_CHECKED])
    at = HEADER_BYTES
    for i, (offset, length) in enumerate(entry.bounds):
        if offset > at and entry.image[at:offset].any():
            raise _corrupt("padding", f"bytes before {_SECTIONS[i]} are not zero")
        if xxhash.xxh3_128_digest(data[offset : offset + length]) != sums[16 * i : 16 * (i + 1)]:
            raise _corrupt(_SECTIONS[i], f"the checksum of its {_SECTIONS[i]} is wrong")
        at = offset + length
    if entry.image[_CHECKED + 16 : HEADER_BYTES].any():
        raise _corrupt("header", "bytes after the checksums are not zero")
    return entry


def _corrupt(section: str, reason: str) -> CorruptStateError:
    return CorruptStateError(f"damaged block: {reason}", reason=reason, section=section)
