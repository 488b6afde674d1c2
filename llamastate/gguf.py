"""Which weights a GGUF file holds: enough of the format to tell, without reading the weights.

Content counts, not packaging: hyperparameters, vocabulary, the table of tensors and samples of their bytes. What only
describes (``general.*``, chat templates, how a model is split into files) does not, so that renaming or splitting a
model leaves its states valid.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from llamastate._native.lists import skip_strings

__all__ = ["GGUFError", "Identity", "Stamps", "TensorInfo", "identify", "stamps_of"]

#: What tells a file from its successor: real path, device, inode, size, mtime in ns. One for each part of a model.
Stamps: TypeAlias = "tuple[tuple[str, int, int, int, int], ...]"

_MAGIC = b"GGUF"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LAYOUTS = {letter: struct.Struct("<" + letter) for letter in _SCALARS.values()}
_LENGTH = _LAYOUTS["Q"].pack
_MAX_DIMS = 4

#: Up to here every byte is hashed; beyond, samples.
_WHOLE = 16 << 20
_SAMPLE = 1024
#: Models that this process has seen.
_known: dict[Stamps, Identity] = {}
_MAX_KNOWN = 64


class GGUFError(ValueError):
    """A file that is no GGUF, or ends too soon. Internal: callers turn it into an error of theirs."""


class TensorInfo(NamedTuple):
    """One row of the tensor table: ``ggml_type``, dimensions (fastest first), where its bytes are, how many."""

    type: int
    dims: tuple[int, ...]
    part: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Identity:
    """What a file holds.

    Attributes
    ----------
    digest : str
        BLAKE2b-256 (hex) over the content.
    scalars : dict
        Metadata that is a number, a truth value or a string.
    tensors : dict
        By name.
    """

    digest: str
    scalars: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)


def parts_of(path: str) -> list[str]:
    """All files of a model, by the name of the first: ``x-00001-of-00003.gguf`` stands for three."""
    found = _PART.search(path)
    if found is None or int(found[1]) != 1:
        return [path]
    stem, count = path[: found.start()], int(found[2])
    return [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def stamps_of(path: str) -> Stamps:
    """Look at all files of a model, without opening them.

    Raises
    ------
    OSError
        One is not there.
    """
    return tuple(_stamp(os.path.realpath(part)) for part in parts_of(path))


def _stamp(real: str) -> tuple[str, int, int, int, int]:
    s = os.stat(real)
    return real, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def identify(path: str, stamps: Stamps | None = None) -> Identity:
    """Find out what a model or an adapter is made of.

    Parameters
    ----------
    path : str
        Of a split model, the first file.
    stamps : Stamps, optional
        What :func:`stamps_of` said when the model was loaded: the files must still be those.

    Raises
    ------
    GGUFError
        Not a GGUF, damaged, or changed while it was being read.
    OSError
        It cannot be read.

    Notes
    -----
    Reads the metadata and a few kilobytes of each tensor (all of them up to 16 MiB), however large the model: some
    milliseconds from the page cache. Remembered as long as path, inode, size and modification time stay the same.
    """
    before = stamps_of(path) if stamps is None else stamps
    known = _known.get(before)
    if known is not None:
        return known
    # by their real paths: the working folder, or where a link points to, may be another by now
    if stamps is not None and tuple(_stamp(s[0]) for s in stamps) != stamps:
        raise GGUFError("it has been changed or replaced since it was loaded")
    identity = _read(before)
    if tuple(_stamp(s[0]) for s in before) != before:
        raise GGUFError("it was changed while it was being read")
    while len(_known) >= _MAX_KNOWN:
        _known.pop(next(iter(_known)))
    _known[before] = identity
    return identity


def _read(stamps: Stamps) -> Identity:
    digest = hashlib.blake2b(digest_size=32)
    metadata: dict[bytes, bytes] = {}
    scalars: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for part, stamp in enumerate(stamps):
        with open(stamp[0], "rb") as file:
            try:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise GGUFError("it is empty") from None
            with view:
                _Reader(view, part).read(metadata, scalars, tensors)
    count = scalars.get("split.count", 1)
    if count not in (0, 1, len(stamps)):
        raise GGUFError(f"it is one of {count} parts, and {len(stamps)} go by that name")
    for key in sorted(metadata):
        if _decisive(key):
            _feed(digest, key, metadata[key])
    total = sum(t.n_bytes for t in tensors.values())
    files = [os.open(stamp[0], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) for stamp in stamps]
    try:
        for fd in files:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for name in sorted(tensors):
            info = tensors[name]
            _feed(digest, name.encode("utf-8", "surrogateescape"), repr((info.type, info.dims, info.n_bytes)).encode())
            fd, start = files[info.part], info.offset
            samples = _samples(name, info.n_bytes, whole=total <= _WHOLE)
            digest.update(b"".join([_pread(fd, size, start + at) for at, size in samples]))
    finally:
        for fd in files:
            os.close(fd)
    return Identity(digest.hexdigest(), scalars, tensors)


def _decisive(key: bytes) -> bool:
    """Whether a metadata key can change what the model computes, or which tokens a text becomes."""
    if key.startswith(b"general."):
        return key in (b"general.architecture", b"general.type")
    return not key.startswith((b"split.", b"tokenizer.chat_template", b"quantize."))


def _samples(name: str, n_bytes: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Which bytes of a tensor are hashed: (offset, length), the ends and some places between that its name decides."""
    if whole or n_bytes <= 8 * _SAMPLE:
        yield 0, n_bytes
        return
    yield 0, _SAMPLE
    yield n_bytes - _SAMPLE, _SAMPLE
    between = 2 + min(12, n_bytes >> 26)
    stride = (n_bytes - 2 * _SAMPLE) // between
    start = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
    for i in range(between):
        yield i * stride + start % stride, _SAMPLE


def _pread(fd: int, size: int, at: int) -> bytes:
    whole = os.pread(fd, size, at)
    if len(whole) == size:
        return whole
    data = bytearray(whole)
    while len(data) < size:
        chunk = os.pread(fd, size - len(data), at + len(data))
        if not chunk:
            raise GGUFError(f"it ends inside a tensor, at {at + len(data)}")
        data += chunk
    return bytes(data)


def _feed(digest: Any, *fields: bytes) -> None:
    digest.update(b"".join([part for data in fields for part in (_LENGTH(len(data)), data)]))


class _Reader:
    """One file. Every length is compared with what is there before it is used."""

    def __init__(self, view: mmap.mmap, part: int) -> None:
        self.view = view
        self.part = part
        self.at = 0

    def take(self, layout: str) -> Any:
        """The next number."""
        known = _LAYOUTS[layout]
        try:
            (value,) = known.unpack_from(self.view, self.at)
        except struct.error:
            raise GGUFError(f"it ends too soon, at {self.at}") from None
        self.at += known.size
        return value

    def string(self) -> bytes:
        """The next string."""
        length = self.take("Q")
        if length > len(self.view) - self.at:
            raise GGUFError(f"a string of {length} bytes at {self.at}")
        self.at += length
        return bytes(self.view[self.at - length : self.at])

    def read(self, metadata: dict[bytes, bytes], scalars: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        """Add what the file holds. The first part's metadata counts."""
        if self.view[:4] != _MAGIC:
            raise GGUFError(f"it begins with {bytes(self.view[:4])!r}")
        self.at = 4
        version = self.take("I")
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version} is not known")
        n_tensors, n_keys = self.take("Q"), self.take("Q")
        alignment = 32
        for _ in range(n_keys):
            key = self.string()
            start = self.at
            value = self.value(self.take("I"))
            metadata.setdefault(key, bytes(self.view[start : self.at]))
            if value is not None:
                scalars.setdefault(key.decode("utf-8", "surrogateescape"), value)
            if key == b"general.alignment" and isinstance(value, int):
                alignment = value
        rows = [self.tensor() for _ in range(n_tensors)]
        if alignment <= 0 or alignment & (alignment - 1):
            raise GGUFError(f"alignment {alignment}")
        data = -(-self.at // alignment) * alignment
        # A tensor's size is where the next one begins: that needs no table of types.
        ends = sorted({offset for _, _, _, offset in rows} | {len(self.view) - data})
        following = dict(itertools.pairwise(ends))
        for name, kind, dims, offset in rows:
            end = following.get(offset)
            if end is None or offset < 0 or data + end > len(self.view):
                raise GGUFError(f"tensor {name!r} lies outside the file")
            if name in tensors:
                raise GGUFError(f"tensor {name!r} is there twice")
            tensors[name] = TensorInfo(kind, dims, self.part, data + offset, end - offset)

    def value(self, kind: int) -> Any:
        """Pass over a value; its content if it is a scalar."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string().decode("utf-8", "surrogateescape")
        if kind != _ARRAY:
            raise GGUFError(f"a value of type {kind} at {self.at}")
        inner, count = self.take("I"), self.take("Q")
        if inner == _STRING:
            try:
                self.at = skip_strings(self.view, self.at, count)
            except ValueError as error:
                raise GGUFError(str(error)) from None
        elif inner in _SCALARS:
            size = count * _LAYOUTS[_SCALARS[inner]].size
            if size > len(self.view) - self.at:
                raise GGUFError(f"an array of {size} bytes at {self.at}")
            self.at += size
        else:
            raise GGUFError(f"an array of type {inner} at {self.at}")
        return None

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """The next row of the tensor table."""
        name = self.string().decode("utf-8", "surrogateescape")
        n_dims = self.take("I")
        if n_dims > _MAX_DIMS:
            raise GGUFError(f"tensor {name!r} has {n_dims} dimensions")
        dims = tuple(self.take("Q") for _ in range(n_dims))
        return name, self.take("I"), dims, self.take("Q")
