"""The files of a store on disk.

::

    store.json                which version of all this
    index.sqlite              which entries there are (llamastate.prefix.index); made anew from the files if need be
    roots/<root>.json         what a root stands for
    blocks/ab/<key>.llblk     one entry (llamastate.prefix.entry); ab is the first byte of its key

Files are written beside their place and renamed into it, and never change afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np
import numpy.typing as npt

from llamastate.atomic import fsync_folder, litter_of, write_atomically
from llamastate.errors import CorruptStateError, LoadError, VersionMismatchError
from llamastate.prefix.chain import KEY_BYTES
from llamastate.prefix.database import now
from llamastate.prefix.entry import HEADER_BYTES, Entry, read, read_header
from llamastate.prefix.index import Root, Row

__all__ = ["FORMAT", "SUFFIX", "Allocate", "Bucket", "Folder", "Identity"]

FORMAT = 1
SUFFIX = ".llblk"

_NAME = re.compile(r"(?P<key>[0-9a-f]{64})\.llblk")
#: Files up to this size are read at once, larger ones only when their header says that they are as large.
_PLAIN = 16 << 20
#: How often a file is begun whose folder, or which itself, somebody else has tidied away meanwhile.
_TRIES = 3

#: What a root's fields are made of.
_ROOT = Root(b"")

#: Gives at least so many bytes, contiguous, to be written to.
Allocate = Callable[[int], npt.NDArray[np.uint8]]
#: What tells a file from another of the same name.
Identity = tuple[int, int, int]


@dataclass
class Bucket:
    """What lies in one folder of blocks: bytes by key, and files of writers that are no more."""

    path: str
    files: dict[bytes, int] = field(default_factory=dict)
    litter: list[str] = field(default_factory=list)


class Folder:
    """Where the files of a store are.

    Parameters
    ----------
    path : str
        Made if it is not there.
    durable : bool
        Wait for the disk at every file.
    readonly : bool
        Make nothing that is not there.

    Raises
    ------
    VersionMismatchError
        A store of a newer version; it is left as it is.
    CorruptStateError
        ``store.json`` cannot be understood.
    OSError
        It cannot be made, read or written.
    """

    def __init__(self, path: str, *, durable: bool, readonly: bool = False) -> None:
        self.path = path
        self.blocks = os.path.join(path, "blocks")
        self.roots_path = os.path.join(path, "roots")
        self._durable = durable
        if not readonly:
            self._make(self.path)
        self._check_format()
        if not readonly:
            self._make(self.blocks)
            self._make(self.roots_path)

    def _make(self, folder: str) -> None:
        """Make a folder, and those it is in; with ``durable``, so that it stays."""
        if os.path.isdir(folder):
            return
        parent = os.path.dirname(folder)
        self._make(parent)
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", folder) from None
        if self._durable:
            fsync_folder(parent)

    def _check_format(self) -> None:
        path = os.path.join(self.path, "store.json")
        try:
            with open(path, "rb") as file:
                data = file.read(1 << 16)
        except FileNotFoundError:
            # durable, whatever the blocks are: nothing else says how to read the rest
            write_atomically(path, [json.dumps({"format": "llamastate prefix store", "version": FORMAT}).encode()])
            return
        try:
            version = json.loads(data)["version"]
        except (ValueError, KeyError, TypeError):
            version = None
        if not isinstance(version, int):
            raise CorruptStateError(
                f"{path!r} does not say of which version this store is", path=path, reason="no version"
            )
        if version > FORMAT:
            raise VersionMismatchError(
                f"{self.path!r} is a store of version {version}; this package knows {FORMAT}",
                path=self.path,
                reason="format version",
                expected=FORMAT,
                found=version,
            )

    # --- entries ------------------------------------------------------------------------------------------------------

    def file(self, key: bytes) -> str:
        """Where an entry is, or would be."""
        name = key.hex()
        return os.path.join(self.blocks, name[:2], name + SUFFIX)

    def read(self, key: bytes, allocate: Allocate | None = None) -> Entry:
        """Read an entry into memory of its own, or into ``allocate(n_bytes)``, and verify every byte.

        Not mapped: whoever cut the file short under a mapping would end this process.

        Raises
        ------
        BadMagicError, CorruptStateError
            Damaged.
        VersionMismatchError
            Of a newer version.
        OSError
            It is not there, or cannot be read.
        """
        path = self.file(key)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(fd, os.fstat(fd).st_size, key, allocate)
        except LoadError as error:
            error.path = path
            raise
        finally:
            os.close(fd)

    def write(self, entry: Entry) -> None:
        """Write the file of an entry, in place of what may be there. Raises ``OSError``, and leaves nothing then."""
        path = self.file(entry.key)
        for left in reversed(range(_TRIES)):
            try:
                self._make(os.path.dirname(path))
                write_atomically(path, [entry.image.data], durable=self._durable)
                return
            except FileNotFoundError:  # noqa: PERF203 - tidied away by another process
                if not left:
                    raise

    def identity(self, key: bytes) -> Identity | None:
        """What tells this file from another that takes its place; None if there is none."""
        try:
            return _identity(os.stat(self.file(key)))
        except OSError:
            return None

    def unlink(self, key: bytes) -> None:
        """Remove the file of an entry, if there is one."""
        path = self.file(key)
        try:
            os.unlink(path)
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # no file, but in its way

    def bucket(self, first: int) -> Bucket:
        """The files of keys that begin with this byte."""
        bucket = Bucket(os.path.join(self.blocks, f"{first:02x}"))
        for entry in _scan(bucket.path):
            match = _NAME.fullmatch(entry.name)
            if match is not None:
                with contextlib.suppress(OSError):
                    bucket.files[bytes.fromhex(match["key"])] = entry.stat().st_size
            elif litter_of(entry.path):
                bucket.litter.append(entry.path)
        return bucket

    def litter(self) -> list[str]:
        """Unfinished files of dead processes that lie outside the blocks."""
        return [e.path for folder in (self.path, self.roots_path) for e in _scan(folder) if litter_of(e.path)]

    def rows(self) -> Iterator[Row]:
        """Rows for all entries, from their headers; what is damaged is left out.

        Reads 256 bytes of each. What the rest of them holds is verified whenever they are read.
        """
        latest = now()
        for first in range(256):
            for key, size in self.bucket(first).files.items():
                with contextlib.suppress(OSError, LoadError), open(self.file(key), "rb", buffering=0) as file:
                    entry = read_header(file.read(HEADER_BYTES))
                    if entry.key == key and sum(entry.bounds[-1]) == size:
                        # no file is from the future, whatever the clock said when it was written
                        yield row_of(entry, min(os.fstat(file.fileno()).st_mtime_ns // 1000, latest), size)

    # --- roots --------------------------------------------------------------------------------------------------------

    def roots(self) -> Iterator[Root]:
        """What is known of roots, in the order in which they came."""
        found = []
        for entry in _scan(self.roots_path):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError), open(entry.path, "rb") as file:
                fields: dict[str, Any] = json.load(file)
                root = Root(**{**fields, "root": bytes.fromhex(fields["root"])})
                if all(type(getattr(root, f.name)) is type(getattr(_ROOT, f.name)) for f in dataclass_fields(root)):
                    found.append(root)
        return iter(sorted(found, key=lambda root: root.created))

    def write_root(self, root: Root) -> None:
        """Keep what is known of a root, for an index that is to be made anew."""
        data = json.dumps({**asdict(root), "root": root.root.hex()}).encode()
        write_atomically(os.path.join(self.roots_path, root.root.hex() + ".json"), [data], durable=self._durable)


def row_of(entry: Entry, used: int, nbytes: int | None = None) -> Row:
    """The row of an entry."""
    size = entry.nbytes if nbytes is None else nbytes
    return Row(entry.key, entry.parent, entry.root, entry.kind, entry.start, entry.tail, size, used)


def _read(fd: int, size: int, key: bytes, allocate: Allocate | None) -> Entry:
    if size > _PLAIN:
        # before so much memory is taken for what a file only pretends to be
        entry = read_header(os.pread(fd, HEADER_BYTES, 0))
        if sum(entry.bounds[-1]) != size:
            raise _damage(f"{size} bytes, not {sum(entry.bounds[-1])}", "end")
        if entry.key != key:
            raise _damage("it is another entry", "header")
    image = np.empty(size, np.uint8) if allocate is None else allocate(size)[:size]
    view, at = memoryview(image), 0  # type: ignore[arg-type,unused-ignore]
    while at < size:
        n = os.preadv(fd, [view[at:]], at) if hasattr(os, "preadv") else _pread(fd, view[at:], at)
        if not n:
            raise _damage(f"it ends after {at} bytes", "end")
        at += n
    entry = read(image)
    if entry.key != key:
        raise _damage("it is another entry", "header")
    return entry


def _pread(fd: int, view: memoryview, at: int) -> int:
    data = os.pread(fd, min(len(view), 1 << 20), at)
    view[: len(data)] = data
    return len(data)


def _damage(reason: str, section: str) -> CorruptStateError:
    return CorruptStateError(f"damaged block: {reason}", reason=reason, section=section)


def _identity(status: os.stat_result) -> Identity:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _scan(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


assert KEY_BYTES == 32  # as the names say
