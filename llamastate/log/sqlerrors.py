"""What SQLite complains of, as this package's errors."""

from __future__ import annotations

import sqlite3

from llamastate.errors import (
    BadMagicError,
    ClosedError,
    CorruptStateError,
    FileAccessError,
    InvalidArgumentError,
    LlamaStateError,
    SaveError,
    StoreFullError,
    StoreLockedError,
)

__all__ = ["BUSY", "code_of", "translated"]

# Primary result codes (https://sqlite.org/rescode.html). The module has names for them only since Python 3.11.
BUSY, _LOCKED, _READONLY, _IOERR, _CORRUPT, _FULL, _CANTOPEN, _TOOBIG, _NOTADB = 5, 6, 8, 10, 11, 13, 14, 18, 26
#: For Python 3.10, which tells no code: what the messages begin with or contain.
_MESSAGES = (
    ("locked", BUSY),
    ("readonly", _READONLY),
    ("disk i/o", _IOERR),
    ("malformed", _CORRUPT),
    ("is full", _FULL),
    ("unable to open", _CANTOPEN),
    ("not a database", _NOTADB),
    ("too big", _TOOBIG),
)


class translated:  # noqa: N801 - used as a function, and twice with every append: a generator would take longer
    """Raise what SQLite raises inside the block as a typed error."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (sqlite3.Error, OverflowError, UnicodeError)):
            raise _translate(error, self._path) from error


def code_of(error: BaseException) -> int:
    """SQLite's primary result code; 0 if it has none."""
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        return code & 0xFF
    text = str(error).lower()
    return next((code for words, code in _MESSAGES if words in text), 0)


def _translate(error: BaseException, path: str) -> LlamaStateError:
    reason = str(error)
    code = code_of(error)
    if isinstance(error, sqlite3.ProgrammingError) and "closed" in reason:
        return ClosedError("the store is closed", what="store")
    if code in (BUSY, _LOCKED):
        return StoreLockedError(f"{path!r} is held by another process", path=path)
    if code == _FULL:
        return StoreFullError(f"there is no room for {path!r} to grow: {reason}", path=path)
    if code == _TOOBIG or isinstance(error, OverflowError):
        return InvalidArgumentError(f"an entry is too large for SQLite: {reason}", name="entries", limit=reason)
    if code == _NOTADB:
        # the magic number of SQLite is 16 bytes of text; as a number it would tell nobody anything
        return BadMagicError(f"{path!r} is no store of logs: {reason}", path=path, reason=reason)
    if code == _READONLY:
        return SaveError(f"cannot write {path!r}: {reason}", path=path, reason=reason)
    if code in (_IOERR, _CANTOPEN):
        return FileAccessError(f"cannot use {path!r}: {reason}", path=path, reason=reason)
    # Anything else (missing tables, constraints that cannot be broken, text that is none) means that the file does not
    # hold what this package has put there.
    return CorruptStateError(f"{path!r} is damaged: {reason}", path=path, reason=reason, section="database")
