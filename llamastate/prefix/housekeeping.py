"""Mending what crashes and bad disks leave; :mod:`llamastate.prefix.disk` says what must hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from llamastate.errors import BadMagicError, CorruptStateError, LoadError, VersionMismatchError
from llamastate.prefix.database import holding, now
from llamastate.prefix.folder import Folder, Identity, row_of
from llamastate.prefix.index import Index

__all__ = ["Damaged", "Reclaimed", "gc", "remove", "unchanged", "verify"]


@dataclass(frozen=True)
class Damaged:
    """An entry that cannot be read, and why."""

    key: bytes
    path: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Reclaimed:
    """What :meth:`DiskTier.gc` has mended.

    Attributes
    ----------
    adopted : int
        Sound files that had no row.
    lost : int
        Rows that had no file.
    damaged : int
        Files that had no row, or another length than their row says, and were not sound either.
    temporary, folders : int
        Files that dead writers have left; empty folders.
    nbytes : int
        Bytes of files that were removed.
    """

    adopted: int
    lost: int
    damaged: int
    temporary: int
    folders: int
    nbytes: int


def verify(folder: Folder, index: Index, *, drop: bool) -> list[Damaged]:
    """Read every file and check every byte; with ``drop``, remove what is damaged."""
    found = []
    for row in index.rows():
        seen = folder.identity(row.key)
        try:
            folder.read(row.key)
        except VersionMismatchError:
            continue
        except (LoadError, OSError) as error:
            if not index.known([row.key]):
                continue  # evicted since
            reason = (error.reason if isinstance(error, LoadError) else error.strerror) or str(error)
            found.append(Damaged(row.key, folder.file(row.key), row.nbytes, reason))
            if drop:
                remove(folder, index, row.key, unchanged(folder, row.key, seen))
    return found


def remove(folder: Folder, index: Index, key: bytes, check: Callable[[], bool] = lambda: True) -> bool:
    """Remove an entry, row first, then file, if ``check()`` holds for each; whether it was there."""
    gone = index.remove([key], lambda _: check())
    there = folder.identity(key) is not None
    index.without_row([key], lambda _: folder.unlink(key) if check() else None)
    return bool(gone) or there


def unchanged(folder: Folder, key: bytes, seen: Identity | None) -> Callable[[], bool]:
    """Whether the file is still the one that was found damaged, and not a sound one in its place."""
    return lambda: folder.identity(key) == seen


def gc(folder: Folder, index: Index) -> Reclaimed:
    """See :meth:`DiskTier.gc <llamastate.prefix.disk.DiskTier.gc>`."""
    with holding(os.path.join(folder.path, "gc.lock")):
        counts = dict.fromkeys(("adopted", "lost", "damaged", "temporary", "folders", "nbytes"), 0)
        for path in [*folder.litter(), index.database.path + ".damaged"]:
            counts["nbytes"] += _unlink(path, counts)
        for first in range(256):
            _tidy(folder, index, first, counts)
    return Reclaimed(**counts)


def _tidy(folder: Folder, index: Index, first: int, counts: dict[str, int]) -> None:
    # Files before rows: a row whose file was not listed may be new, and is looked at again.
    bucket = folder.bucket(first)
    sizes = index.sizes(first)
    for key, size in bucket.files.items():
        if sizes.get(key) != size:
            _adopt(folder, index, key, size, key in sizes, counts)
    lost = [key for key in sizes if key not in bucket.files]
    if lost:
        counts["lost"] += len(index.remove(lost, lambda key: folder.identity(key) is None))
    for path in bucket.litter:
        counts["nbytes"] += _unlink(path, counts)
    with contextlib.suppress(OSError):
        os.rmdir(bucket.path)  # refused unless it is empty
        counts["folders"] += 1


def _adopt(folder: Folder, index: Index, key: bytes, size: int, has_row: bool, counts: dict[str, int]) -> None:
    """Give a file its row, or do away with it."""
    seen = folder.identity(key)
    try:
        entry = folder.read(key)
    except (VersionMismatchError, OSError):
        return
    except (BadMagicError, CorruptStateError):
        remove(folder, index, key, unchanged(folder, key, seen))
        counts["damaged"] += 1
        counts["nbytes"] += size
        return
    if has_row:
        index.remove([key])

    def check() -> None:
        if folder.identity(key) is None:
            raise FileNotFoundError

    with contextlib.suppress(FileNotFoundError):
        counts["adopted"] += index.add(row_of(entry, min(seen[1] // 1000, now()) if seen else now()), check)


def _unlink(path: str, counts: dict[str, int]) -> int:
    """Remove a file that nobody misses; how many bytes it had."""
    with contextlib.suppress(OSError):
        size = os.stat(path).st_size
        os.unlink(path)
        counts["temporary"] += 1
        return size
    return 0
