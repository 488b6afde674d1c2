"""The bytes of a snapshot: a header, a table, aligned sections. docs/llsnap.md describes them one by one.

Nothing here knows what a state is; sections go in, and sections or errors come out. Whatever the bytes, reading them
either gives a directory whose every section lies inside them, or a typed error.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import xxhash

from llamastate.errors import BadMagicError, CorruptStateError, VersionMismatchError
from llamastate.layout.known import what_is

__all__ = [
    "ALIGNMENT",
    "MAGIC",
    "SEALED",
    "VERSION",
    "Directory",
    "Form",
    "Kind",
    "Section",
    "checksum",
    "form",
    "lay_out",
    "read",
    "seal",
    "section_key",
    "section_name",
]

#: The first byte is no text, and the ends of line show a transfer that rewrote them.
MAGIC = b"\x89LLSNP\r\n"
VERSION = 1
ALIGNMENT = 64

#: Header flag: the checksums have been filled in.
SEALED = 1
#: Section flag: a reader that does not know this kind must not use the file.
REQUIRED = 1

_HEADER = struct.Struct("<8sIIQQ16s16s")  # magic, version, n_sections, total, flags, table checksum, header checksum
_HEADER_BYTES = _HEADER.size
_CHECKED = _HEADER_BYTES - 16
_ENTRY = struct.Struct("<IIQQII16s")  # kind, flags, offset, length, detail, reserved, checksum
_ENTRY_BYTES = _ENTRY.size
#: More would be no snapshot: each checkpoint takes two.
MAX_SECTIONS = 1 << 16


class Kind(IntEnum):
    """What a section holds."""

    FINGERPRINT = 1
    TOKENS = 2
    STATE = 3
    LOGITS = 4
    SAMPLER = 5
    METADATA = 6
    CHECKPOINTS = 7
    CHECKPOINT_STATE = 8
    CHECKPOINT_LOGITS = 9


_NAMES: dict[int, str] = {
    Kind.FINGERPRINT: "fingerprint",
    Kind.TOKENS: "tokens",
    Kind.STATE: "state",
    Kind.LOGITS: "logits",
    Kind.SAMPLER: "sampler",
    Kind.METADATA: "metadata",
    Kind.CHECKPOINTS: "checkpoints",
    Kind.CHECKPOINT_STATE: "checkpoint {}: state",
    Kind.CHECKPOINT_LOGITS: "checkpoint {}: logits",
}
#: Without these nothing can be restored.
_REQUIRED = frozenset((Kind.FINGERPRINT, Kind.TOKENS, Kind.STATE))
_NO_CHECKSUM = bytes(16)


class Section(NamedTuple):
    """One row of the table.

    ``detail`` is the number of the checkpoint in its sections and the state flags in the state's; else 0.
    """

    kind: int
    flags: int
    offset: int
    length: int
    detail: int
    checksum: bytes = _NO_CHECKSUM


class Directory(NamedTuple):
    """What an image holds: the sections that this version knows, by kind and detail (0 for the state)."""

    total: int
    sealed: bool
    sections: dict[tuple[int, int], Section]


class Form(NamedTuple):
    """How an image lies, before it is sealed: all of it but the contents of sections."""

    #: Header, table and zeros, up to the first section.
    front: bytes
    sections: tuple[Section, ...]
    by_key: Mapping[tuple[int, int], Section]
    total: int


def section_key(section: Section) -> tuple[int, int]:
    """How sections are looked up: by kind, those of checkpoints by number as well."""
    numbered = section.kind in (Kind.CHECKPOINT_STATE, Kind.CHECKPOINT_LOGITS)
    return section.kind, section.detail if numbered else 0


def section_name(section: Section) -> str:
    """How errors call a section."""
    return _NAMES.get(section.kind, f"section of kind {section.kind}").format(section.detail)


def checksum(view: Any) -> bytes:
    """XXH3-128 of a buffer, 16 bytes, most significant first. The GIL is free meanwhile."""
    return xxhash.xxh3_128_digest(view)


def aligned(n: int) -> int:
    """The next multiple of the alignment."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def lay_out(items: Sequence[tuple[int, int, int]]) -> list[Section]:
    """Give each section its place.

    Parameters
    ----------
    items : sequence of (kind, detail, length)
        In the order of the file.
    """
    sections = []
    at = _HEADER_BYTES + _ENTRY_BYTES * len(items)
    for kind, detail, length in items:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        sections.append(Section(kind, REQUIRED if kind in _REQUIRED else 0, at, length, detail))
        at += length
    return sections


# Cached: a state is taken again and again at the same sizes. After a copy of many megabytes, which has driven all else
# out of the processor's caches, it is the number of things touched that takes time.
@lru_cache(maxsize=64)
def form(items: tuple[tuple[int, int, int], ...]) -> Form:
    """How an image of these sections, (kind, detail, length) each, lies."""
    sections = tuple(lay_out(items))
    front = _front(sections, sealed=False).ljust(sections[0].offset, b"\0")
    end = sections[-1].offset + sections[-1].length
    return Form(front, sections, {section_key(s): s for s in sections}, end)


def _front(sections: Sequence[Section], *, sealed: bool) -> bytes:
    """Header and table."""
    table = b"".join([_ENTRY.pack(k, f, offset, n, d, 0, digest) for k, f, offset, n, d, digest in sections])
    total = sections[-1].offset + sections[-1].length
    if not sealed:
        return _HEADER.pack(MAGIC, VERSION, len(sections), total, 0, _NO_CHECKSUM, _NO_CHECKSUM) + table
    header = _HEADER.pack(MAGIC, VERSION, len(sections), total, SEALED, checksum(table), _NO_CHECKSUM)[:_CHECKED]
    return header + checksum(header) + table


def seal(image: memoryview, sections: Sequence[Section]) -> list[Section]:
    """Fill all checksums in. Reads every byte once."""
    done = [s._replace(checksum=checksum(image[s.offset : s.offset + s.length])) for s in sections]
    front = _front(done, sealed=True)
    image[: len(front)] = front
    return done


def read(image: memoryview, *, exact: bool) -> Directory:
    """Read and verify header and table.

    Parameters
    ----------
    image : memoryview
        Of bytes.
    exact : bool
        Nothing may follow the image, as in a file; shared memory is larger than what was put into it.

    Raises
    ------
    BadMagicError
        No snapshot.
    VersionMismatchError
        Of a format version, or with a section that has to be understood, that this package does not know.
    CorruptStateError
        ``section`` is "header", "table", "padding" or "end".
    """
    if image.nbytes < _HEADER_BYTES:
        if image[: len(MAGIC)] != MAGIC[: image.nbytes]:
            raise _bad_magic(bytes(image[:8]))
        raise _corrupt("header", image.nbytes, f"it ends after {image.nbytes} bytes, inside the header")
    magic, version, n_sections, total, flags, table_sum, header_sum = _HEADER.unpack_from(image, 0)
    _check_header(image, magic, version, flags, header_sum)
    if n_sections > MAX_SECTIONS:
        raise _corrupt("header", 12, f"{n_sections} sections")
    end = _HEADER_BYTES + _ENTRY_BYTES * n_sections
    if total < end:
        raise _corrupt("header", 16, f"a total of {total} bytes")
    if image.nbytes < total:
        section = "table" if image.nbytes < end else "end"
        raise _corrupt(section, image.nbytes, f"it ends after {image.nbytes} of {total} bytes")
    if exact and image.nbytes > total:
        raise _corrupt("end", total, f"{image.nbytes - total} bytes follow the snapshot")
    if checksum(image[_HEADER_BYTES:end]) != table_sum:
        raise _corrupt("table", _HEADER_BYTES, "the checksum of the table is wrong")
    sections = [_section(image, _HEADER_BYTES + i * _ENTRY_BYTES) for i in range(n_sections)]
    _check_places(image, sections, end, total)
    return Directory(total, True, _known(sections))


def _check_header(image: memoryview, magic: bytes, version: int, flags: int, header_sum: bytes) -> None:
    """All versions begin with these 64 bytes: that is how a newer file can be told from a damaged one."""
    if magic != MAGIC:
        if checksum(MAGIC + image[len(MAGIC) : _CHECKED]) == header_sum:
            raise _corrupt("header", 0, f"the magic is damaged: {magic!r}")
        raise _bad_magic(magic)
    if not flags & SEALED and header_sum == _NO_CHECKSUM:
        raise _corrupt("header", 24, "it was never sealed: the memory of a snapshot that was taken, not exported")
    if checksum(image[:_CHECKED]) != header_sum:
        raise _corrupt("header", 0, "the checksum of the header is wrong")
    if version > VERSION or flags & ~SEALED:
        found = version if version > VERSION else flags
        raise VersionMismatchError(
            f"a snapshot of format version {version} (flags {flags:#x}); this package reads up to {VERSION}",
            reason="format version" if version > VERSION else "header flags",
            expected=VERSION if version > VERSION else SEALED,
            found=found,
        )
    if version < 1 or not flags & SEALED:
        raise _corrupt("header", 8, f"version {version}, flags {flags:#x}")


def _section(image: memoryview, at: int) -> Section:
    kind, flags, offset, length, detail, _, digest = _ENTRY.unpack_from(image, at)
    return Section(kind, flags, offset, length, detail, digest)


def _check_places(image: memoryview, sections: Sequence[Section], end: int, total: int) -> None:
    """Sections follow each other, aligned, with nothing but zeros between them, up to the end."""
    at = end
    for i, section in enumerate(sections):
        row = _HEADER_BYTES + i * _ENTRY_BYTES
        if section.offset != aligned(at) or section.length > total - section.offset:
            raise _corrupt("table", row, f"{section_name(section)} of {section.length} bytes at {section.offset}")
        if any(image[at : section.offset]):
            raise _corrupt("padding", at, f"bytes before {section_name(section)} are not zero")
        at = section.offset + section.length
    if at != total:
        raise _corrupt("table", end, f"the sections end at {at}, the snapshot at {total}")


def _known(sections: Sequence[Section]) -> dict[tuple[int, int], Section]:
    found: dict[tuple[int, int], Section] = {}
    for i, section in enumerate(sections):
        row = _HEADER_BYTES + i * _ENTRY_BYTES
        if section.kind not in _NAMES:
            if section.flags & REQUIRED:
                raise VersionMismatchError(
                    f"a section of kind {section.kind}, which a reader has to understand and this one does not",
                    reason="section kind",
                    expected=max(Kind),
                    found=section.kind,
                )
            continue
        key = section_key(section)
        if key in found:
            raise _corrupt("table", row, f"{section_name(section)} is there twice")
        found[key] = section
    for kind in sorted(_REQUIRED):
        if (kind, 0) not in found:
            raise _corrupt("table", _HEADER_BYTES, f"there is no {_NAMES[kind]}")
    return found


def _bad_magic(found: bytes) -> BadMagicError:
    known = what_is(found)
    problem = f"it begins with {found!r}" if known is None else f"this is {known}"
    return BadMagicError(
        f"not a snapshot: {problem}",
        reason="magic",
        expected=int.from_bytes(MAGIC, "little"),
        found=int.from_bytes(found, "little"),
    )


def _corrupt(section: str, offset: int, reason: str) -> CorruptStateError:
    return CorruptStateError(f"damaged snapshot: {reason}", reason=reason, offset=offset, section=section)
