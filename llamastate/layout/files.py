"""The two session file formats of llama.cpp: GGSN (a whole context) and GGSQ (one sequence).

Both begin alike; the state follows to the end of the file::

    u32 magic    u32 version    u32 n_tokens    i32 token × n_tokens    state …

The state of a GGSN file is a whole-context blob; that of a GGSQ file a sequence blob *without* the two words of the
in-memory header. Tokens are whatever the writer gave: llama-server puts a packed payload there, which begins with
token -1 and holds more than token ids (:attr:`FileHeader.packed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamastate.errors import BadMagicError, CorruptStateError, InsufficientMaxTokensError, VersionMismatchError
from llamastate.layout.cursor import Borrowed, Cursor
from llamastate.layout.known import what_is

__all__ = ["MAGIC", "VERSION", "FileHeader", "FileKind", "header_bytes", "read_header"]

FileKind = Literal["context", "sequence"]

MAGIC: dict[FileKind, int] = {"context": 0x6767736E, "sequence": 0x67677371}
"""``LLAMA_SESSION_MAGIC`` ("ggsn") and ``LLAMA_STATE_SEQ_MAGIC`` ("ggsq")."""

VERSION: dict[FileKind, int] = {"context": 10, "sequence": 3}
"""``LLAMA_SESSION_VERSION`` and ``LLAMA_STATE_SEQ_VERSION``."""

_HEADER = Struct("<III")
_PACKED = -1  # LLAMA_TOKEN_NULL, llama-server's mark of a packed payload


@dataclass(frozen=True)
class FileHeader:
    """The front of a session file.

    Parameters
    ----------
    kind : {"context", "sequence"}
        Which of the two formats.
    version : int
        Its version.
    tokens : int32[n_tokens]
        The payload as stored, a view of the file's bytes.
    state_offset : int
        Where the state begins; it ends with the file.
    """

    kind: FileKind
    version: int
    tokens: NDArray[np.int32]
    state_offset: int

    @property
    def packed(self) -> bool:
        """Whether ``tokens`` is llama-server's packed payload and not a list of token ids.

        Unpacking it (``server_tokens::deserialize``: a marker, a version, the tokens, then media chunks) is not done
        here; a reader of plain token ids has to refuse it.
        """
        return len(self.tokens) > 0 and int(self.tokens[0]) == _PACKED


def read_header(buf: object, *, kind: FileKind | None = None, max_tokens: int | None = None) -> FileHeader:
    """Read the front of a session file.

    Parameters
    ----------
    buf : buffer
        The whole file (bytes, mmap, …): the number of tokens is checked against its size.
    kind : {"context", "sequence"}, optional
        Accept this format only.
    max_tokens : int, optional
        The most tokens the caller can take.

    Returns
    -------
    FileHeader
        Its ``tokens`` are a view of ``buf``.

    Raises
    ------
    BadMagicError
        Not such a file.
    VersionMismatchError
        A version this llama.cpp does not read.
    CorruptStateError
        The file ends inside the header or the tokens.
    InsufficientMaxTokensError
        More tokens than ``max_tokens``.

    Notes
    -----
    ``llama_context::state_load_file`` and ``state_seq_load_file``. Cost: O(1), nothing is copied.
    """
    with Borrowed(buf) as view:
        return _read(Cursor(view), kind, max_tokens)


def _read(cursor: Cursor, kind: FileKind | None, max_tokens: int | None) -> FileHeader:
    magic = cursor.u32("file.magic")
    kinds: tuple[FileKind, ...] = ("context", "sequence") if kind is None else (kind,)
    found = next((k for k in kinds if MAGIC[k] == magic), None)
    if found is None:
        names = " or ".join({"context": "GGSN", "sequence": "GGSQ"}[k] for k in kinds)
        what = what_is(bytes(cursor.view[:68])) or f"it begins with {magic:#010x}"
        problem = what if what.startswith("it ") else f"this is {what}"
        raise BadMagicError(f"not a {names} file: {problem}", reason=problem, expected=MAGIC[kinds[0]], found=magic)
    version = cursor.u32("file.version")
    if version != VERSION[found]:
        raise VersionMismatchError(
            f"a {found} file of version {version}; this llama.cpp reads version {VERSION[found]}",
            expected=VERSION[found],
            found=version,
        )
    n_tokens = cursor.u32("file.n_tokens")
    if 4 * n_tokens > cursor.remaining:
        reason = f"{n_tokens} tokens are claimed and {cursor.remaining} bytes follow"
        raise CorruptStateError(f"corrupt session file: {reason}", reason=reason, offset=8, section="file.n_tokens")
    if max_tokens is not None and n_tokens > max_tokens:
        raise InsufficientMaxTokensError(
            f"the file holds {n_tokens} tokens, more than the {max_tokens} allowed",
            n_out=n_tokens,
            max_tokens=max_tokens,
        )
    tokens = cursor.words(n_tokens, "file.tokens")
    return FileHeader(found, version, tokens, cursor.at)


def header_bytes(kind: FileKind, tokens: ArrayLike) -> bytes:
    """The bytes of a session file in front of the state.

    Parameters
    ----------
    kind : {"context", "sequence"}
        Which format.
    tokens : int32[n]
        Token ids (or a packed payload), stored as they are.

    Returns
    -------
    bytes
        ``12 + 4 * n`` of them, equal to what ``llama_state_save_file`` / ``llama_state_seq_save_file`` write.

    Raises
    ------
    ValueError
        ``tokens`` is not one-dimensional or holds values that are no int32.
    """
    wide = np.asarray(tokens)
    if wide.size == 0:
        wide = np.empty(0, np.int32)
    if wide.ndim != 1:
        raise ValueError(f"tokens must have one dimension, not {wide.ndim}")
    if wide.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers, not {wide.dtype}")
    ids = wide.astype("<i4")
    if not np.array_equal(ids, wide):
        raise ValueError("tokens must fit into int32")
    return _HEADER.pack(MAGIC[kind], VERSION[kind], len(ids)) + ids.tobytes()
