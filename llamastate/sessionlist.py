"""What is in a folder of saved sessions, read from the heads of the files; nothing is made, locked or removed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from llamastate.errors import CorruptStateError, FileAccessError, LlamaStateError, StateFileNotFoundError
from llamastate.names import check_name
from llamastate.snapfile import Kind
from llamastate.snapparts import CheckpointFlags, CheckpointRecord, is_row
from llamastate.snapshot import Snapshot

if TYPE_CHECKING:
    from llamastate.fingerprint import Fingerprint

__all__ = ["OWN", "SUFFIX", "SessionInfo", "kept_metadata", "list_sessions", "saved_checkpoints", "session_files"]

SUFFIX = ".llsnap"
#: Where the metadata of a saved session keeps what the manager knows of it.
OWN = "llamastate"


@dataclass(frozen=True)
class SessionInfo:
    """What the header of a saved session says.

    Attributes
    ----------
    name, path : str
    size : int
        Bytes of the file.
    modified : datetime
        When it was last saved, UTC.
    age : float
        Seconds since then.
    n_tokens : int or None
        How many it holds; None, like all that follows, if the file is damaged.
    n_checkpoints : int or None
        Those that the caller made.
    model : str or None
        Its description (``llama_model_desc``); None too if a session was put there by other means.
    created : datetime or None
        UTC; likewise.
    fingerprint : Fingerprint or None
        What the state depends on.
    metadata : dict
        What was given to :meth:`SessionManager.save`.
    error : LlamaStateError or None
        What is wrong with the file. Only headers were read: damage inside a state shows when it is loaded or verified.
    """

    name: str
    path: str
    size: int
    modified: datetime
    age: float
    n_tokens: int | None = None
    n_checkpoints: int | None = None
    model: str | None = None
    created: datetime | None = None
    fingerprint: Fingerprint | None = field(default=None, repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)
    error: LlamaStateError | None = None

    @property
    def damaged(self) -> bool:
        """Whether it cannot be loaded."""
        return self.error is not None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; times in ISO 8601, of the fingerprint its digest."""
        return {
            "name": self.name,
            "path": self.path,
            "size": self.size,
            "modified": self.modified.isoformat(),
            "age": round(self.age, 3),
            "n_tokens": self.n_tokens,
            "n_checkpoints": self.n_checkpoints,
            "model": self.model,
            "created": None if self.created is None else self.created.isoformat(),
            "architecture": None if self.fingerprint is None else self.fingerprint.architecture,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.digest,
            "metadata": self.metadata,
            "error": None if self.error is None else str(self.error),
        }


def list_sessions(folder: str | os.PathLike[str]) -> list[SessionInfo]:
    """All saved sessions in a folder, by name, without making, locking or removing anything.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    list of SessionInfo

    Raises
    ------
    FileAccessError
        The folder cannot be read.
    """
    infos = [_info(name, entry) for name, entry in session_files(os.fsdecode(folder))]
    return sorted((info for info in infos if info is not None), key=lambda info: info.name)


def saved_checkpoints(snapshot: Snapshot) -> tuple[CheckpointRecord, ...]:
    """The checkpoints in a snapshot that the caller made, oldest first, without reading their states."""
    rows = snapshot._parsed(Kind.CHECKPOINTS) or []
    for i, row in enumerate(rows):
        if not is_row(row):
            raise CorruptStateError(
                f"damaged snapshot: checkpoint {i}", path=snapshot.path, reason=f"checkpoint {i}", section="checkpoints"
            )
    points = [CheckpointRecord(r["n_tokens"], r["label"], r["created"], r["flags"]) for r in rows]
    return tuple(p for p in points if not p.flags & CheckpointFlags.AUTOMATIC)


def session_files(folder: str) -> list[tuple[str, os.DirEntry[str]]]:
    """Name and file of each session."""
    try:
        with os.scandir(folder) as entries:
            return [
                (unicodedata.normalize("NFC", entry.name[: -len(SUFFIX)]), entry)
                for entry in entries
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.is_file()
            ]
    except OSError as error:
        cls = StateFileNotFoundError if isinstance(error, FileNotFoundError) else FileAccessError
        raise cls(
            f"cannot read {folder!r}: {error.strerror}", path=folder, reason=error.strerror, code=error.errno
        ) from None


def _info(name: str, entry: os.DirEntry[str]) -> SessionInfo | None:
    """What there is to say about a file; None if it is gone by now."""
    try:
        status = entry.stat()
    except OSError:
        return None
    modified = datetime.fromtimestamp(status.st_mtime, timezone.utc)
    plain = SessionInfo(name, entry.path, status.st_size, modified, max(0.0, time.time() - status.st_mtime))
    try:
        check_name(name)
        with Snapshot.open(entry.path) as snapshot:
            metadata, own = _split(snapshot)
            model = own.get("model")
            return dataclasses.replace(
                plain,
                n_tokens=snapshot.n_tokens,
                n_checkpoints=len(saved_checkpoints(snapshot)),
                model=model if isinstance(model, str) else None,
                created=_time(own.get("created")),
                fingerprint=snapshot.fingerprint,
                metadata=metadata,
            )
    except StateFileNotFoundError:
        return None
    except LlamaStateError as error:
        return dataclasses.replace(plain, error=error)


def kept_metadata(path: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file keeps for the caller and for the manager; nothing if it is damaged: it is about to be replaced."""
    if path is not None:
        with contextlib.suppress(LlamaStateError), Snapshot.open(path) as snapshot:
            return _split(snapshot)
    return {}, {}


def _split(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = dict(snapshot.metadata)
    own = metadata.pop(OWN, None)
    return metadata, own if isinstance(own, dict) else {}


def _time(ns: Any) -> datetime | None:
    if type(ns) is not int:
        return None
    try:
        return datetime.fromtimestamp(ns / 1e9, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return None
