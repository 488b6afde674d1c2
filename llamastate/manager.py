"""A folder of named sessions, each in a snapshot file of its own.

A name belongs to one process at a time: from :meth:`SessionManager.create` or :meth:`SessionManager.load` on until the
session is gone or the name is released, so that two processes cannot both load a conversation and the one that saves
last wipe out what the other has added.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from llamastate import namelocks
from llamastate.arrays import TokensLike
from llamastate.atomic import fsync_folder, litter_of
from llamastate.errors import (
    InvalidArgumentError,
    LlamaStateError,
    SaveError,
    SessionExistsError,
    SessionNameError,
    SessionNotFoundError,
    StateFileNotFoundError,
    StoreLockedError,
)
from llamastate.lifetimes import Closing
from llamastate.names import check_name, fold
from llamastate.sampler import Sampler
from llamastate.session import Session
from llamastate.sessionlist import (
    OWN,
    SUFFIX,
    SessionInfo,
    kept_metadata,
    list_sessions,
    saved_checkpoints,
    session_files,
)
from llamastate.snapparts import CheckpointRecord
from llamastate.snapshot import Snapshot
from llamastate.words import brief

if TYPE_CHECKING:
    from llamastate.context import Context
    from llamastate.namelocks import Held

__all__ = ["SUFFIX", "SessionInfo", "SessionManager", "list_sessions", "saved_checkpoints"]

_LOCK = re.compile(r"\.[0-9a-f]{32}\.lock")

#: Inside the class ``list`` is a method.
_Infos: TypeAlias = list[SessionInfo]


class SessionManager(Closing):
    """Named sessions in a folder.

    Parameters
    ----------
    folder : path-like
        Made if it is missing.
    on_busy : {"raise", "wait"}
        What to do while another process has a name.
    timeout : float, optional
        Seconds to wait at most; for ever if not given.

    Raises
    ------
    SaveError
        The folder cannot be made.

    Notes
    -----
    Names have to be portable file names: at most 100 bytes of UTF-8, without separators, control or invisible
    characters, ``<>:"|?*``, a leading dot, a dot at the end, spaces at either end, and no device of Windows. They are
    normalised to NFC, and two that differ in case only cannot both be there.

    A name is locked by a process from :meth:`create`, :meth:`load` or :meth:`load_or_create` until every session that
    came from there is closed or gone (garbage-collected), :meth:`release` or :meth:`close` is called, or the process
    ends, however it ends. :meth:`save` and :meth:`delete` of a name that is not held lock it while they run.
    :meth:`list`, :meth:`checkpoints` and :meth:`open` lock nothing: files are replaced as a whole, and a reader keeps
    the one that it has opened. Within a process all managers share what it holds: one saved session can be loaded into
    many sequences. In a folder that cannot be written sessions can be loaded all the same. Locks are ``flock`` s: on a
    network file system they are as good as its own.

    What saves that were killed have left behind is removed when a manager is made; files of living processes are not.

    Examples
    --------
    >>> manager = SessionManager("sessions")  # doctest: +SKIP
    >>> session = manager.load_or_create("alice", ctx, system_prompt="You are terse.")  # doctest: +SKIP
    >>> session.feed("Hello")  # doctest: +SKIP
    >>> manager.save("alice", session)  # doctest: +SKIP
    >>> [(info.name, info.n_tokens) for info in manager.list()]  # doctest: +SKIP
    [('alice', 7)]
    """

    def __init__(self, folder: str | os.PathLike[str], *, on_busy: str = "raise", timeout: float | None = None) -> None:
        if not isinstance(folder, (str, bytes, os.PathLike)):
            raise InvalidArgumentError(f"folder is {type(folder).__name__}, not a path", name="folder", value=folder)
        if on_busy not in ("raise", "wait"):
            raise InvalidArgumentError(
                f"on_busy = {brief(on_busy)} is neither 'raise' nor 'wait'", name="on_busy", value=on_busy
            )
        self._timeout = 0.0 if on_busy == "raise" else timeout
        try:
            self.folder = os.path.realpath(os.fsdecode(folder))
            os.makedirs(self.folder, exist_ok=True)
        except (OSError, TypeError, ValueError) as error:
            raise _save_error("make", repr(folder), error) from error
        #: What gives the locks of sessions back that came from here, by name.
        self._out: dict[str, list[weakref.finalize[Any, Any]]] = {}
        self._remove_litter()

    # --- sessions -----------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        ctx: Context,
        *,
        seq_id: int = 0,
        system_prompt: str | TokensLike | None = None,
        parse_special: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Session:
        """Begin a session, and save it.

        Parameters
        ----------
        name : str
        ctx : Context
        seq_id : int
            An empty sequence.
        system_prompt : str or array-like of int, optional
            What it begins with.
        parse_special : bool
            Read ``<|im_start|>`` and the like in it as control tokens.
        metadata : mapping, optional
            Anything of JSON types, to be kept with it.
        **options
            As for :class:`Session`.

        Raises
        ------
        SessionExistsError, SessionNameError
            There is one of that name, or of one that differs in case only; or it can be no name.
        StoreLockedError
            Another process has it.
        SequenceChangedError
            The sequence is not empty.
        SaveError, NoKVSlotError, DecodeError, TokenizeError
            There is no such session, and the sequence is empty again.
        """
        name = check_name(name)
        with self._operation(name) as held:
            if self._existing(name) is not None:
                raise SessionExistsError(f"there is a session {name!r} already", name=name, reason="it exists")
            session = Session(ctx, seq_id, **options)
            try:
                if system_prompt is not None:
                    session.feed(system_prompt, parse_special=parse_special)
                self._write(name, session, None, None, {} if metadata is None else metadata)
            except BaseException:
                with contextlib.suppress(LlamaStateError):
                    ctx.seq_rm(session.seq_id)
                raise
            return self._check_out(name, session, held)

    def load(self, name: str, ctx: Context, *, seq_id: int = 0, **options: Any) -> Session:
        """Bring a session back, with its checkpoints.

        Parameters
        ----------
        name : str
        ctx : Context
            Of the same model and cache settings.
        seq_id : int
            The sequence to use. What it held is replaced.
        **options
            As for :class:`Session`.

        Raises
        ------
        SessionNotFoundError, SessionNameError
            There is none of that name, or it can be no name.
        StoreLockedError
            Another process has it.
        LoadError
            One of its subclasses says why; the sequence is as it was.

        Notes
        -----
        Moves every byte of the state once, and reads every byte once more to verify it.
        """
        name = check_name(name)
        with self._operation(name, read_only=True) as held:
            return self._check_out(name, Session.load(ctx, self._find(name), seq_id=seq_id, **options), held)

    def load_or_create(
        self,
        name: str,
        ctx: Context,
        *,
        seq_id: int = 0,
        system_prompt: str | TokensLike | None = None,
        parse_special: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Session:
        """:meth:`load` if there is one of that name, else :meth:`create`; nobody can come in between."""
        name = check_name(name)
        with self._operation(name, read_only=True):
            if self._existing(name) is not None:
                return self.load(name, ctx, seq_id=seq_id, **options)
            return self.create(
                name,
                ctx,
                seq_id=seq_id,
                system_prompt=system_prompt,
                parse_special=parse_special,
                metadata=metadata,
                **options,
            )

    def save(
        self,
        name: str,
        session: Session,
        *,
        sampler: Sampler | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """Write a session to its file, atomically and durably, in place of what was there.

        Parameters
        ----------
        name : str
            A new one makes a copy under that name.
        session : Session
        sampler : Sampler or mapping, optional
            To be kept with it (:attr:`Snapshot.sampler_state` of :meth:`open`).
        metadata : mapping, optional
            In place of what was kept; None leaves that.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        SessionNameError
            It can be no name, or there is one that differs in case only.
        StoreLockedError
            Another process has it.
        SaveError
            No room, for one. The old file, if any, is as it was.

        Notes
        -----
        Moves every byte of the state once, reads it once more for the checksums, and waits for the disk.
        """
        name = check_name(name)
        if not isinstance(session, Session):
            raise InvalidArgumentError(
                f"session is {type(session).__name__}, not a Session", name="session", value=session
            )
        with self._operation(name):
            return self._write(name, session, self._existing(name), sampler, metadata)

    def delete(self, name: str) -> None:
        """Remove a session's file, whatever its condition. A session that is loaded lives on, and can be saved again.

        Raises
        ------
        SessionNotFoundError, SessionNameError
            There is none of that name, or it can be no name.
        StoreLockedError
            Another process has it.
        SaveError
            The folder cannot be written.
        """
        name = check_name(name)
        with self._operation(name):
            path = self._find(name)
            try:
                os.unlink(path)
                fsync_folder(self.folder)
            except OSError as error:
                raise _save_error("delete", path, error) from error

    def release(self, name: str) -> None:
        """Let other processes have a name. Sessions of it live on; whoever saves last then wins."""
        for drop in self._out.pop(check_name(name), ()):
            drop()

    def close(self) -> None:
        """:meth:`release` every name. Idempotent; the manager can still be used."""
        for name in list(self._out):
            self.release(name)

    def __repr__(self) -> str:
        return f"<llamastate.SessionManager {self.folder!r}>"

    # --- looking ------------------------------------------------------------------------------------------------------

    def list(self) -> _Infos:
        """All sessions, by name. Reads headers only; a damaged file is listed as such.

        Raises
        ------
        FileAccessError
            The folder cannot be read.
        """
        return list_sessions(self.folder)

    def __iter__(self) -> Iterator[str]:
        """The names, in order."""
        return (info.name for info in list_sessions(self.folder))

    def __len__(self) -> int:
        """How many sessions there are."""
        return len(list_sessions(self.folder))

    def __bool__(self) -> bool:
        """Always true: an empty folder is a manager all the same."""
        return True

    def __contains__(self, name: object) -> bool:
        try:
            self._find(check_name(name))
        except (SessionNameError, SessionNotFoundError):
            return False
        return True

    def open(self, name: str) -> Snapshot:
        """The saved session as a :class:`Snapshot`, mapped: its metadata, its sampler, a state for many sequences.

        Raises
        ------
        SessionNotFoundError, SessionNameError, LoadError
        """
        path = self._find(check_name(name))
        try:
            return Snapshot.open(path)
        except StateFileNotFoundError:
            raise _not_found(name, None) from None

    def checkpoints(self, name: str) -> tuple[CheckpointRecord, ...]:
        """The checkpoints that the caller made, oldest first, without their states. No model is needed.

        After :meth:`load`, :attr:`Session.checkpoints` has them in the same order, and :meth:`Session.rollback` goes
        back to one.

        Raises
        ------
        SessionNotFoundError, SessionNameError, LoadError
        """
        with self.open(name) as snapshot:
            return saved_checkpoints(snapshot)

    def path(self, name: str) -> str:
        """Where the session of that name is or would be kept."""
        name = check_name(name)
        return self._existing(name) or os.path.join(self.folder, name + SUFFIX)

    # --- files --------------------------------------------------------------------------------------------------------

    def _write(
        self,
        name: str,
        session: Session,
        old: str | None,
        sampler: Sampler | Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
    ) -> int:
        kept, own = kept_metadata(old)
        given: Any = kept if metadata is None else metadata
        if not isinstance(given, Mapping) or OWN in given:
            raise InvalidArgumentError(f"metadata is a mapping without {OWN!r}", name="metadata", value=metadata)
        own = {"created": own.get("created", time.time_ns()), "model": session.ctx.model.desc}
        path = old or os.path.join(self.folder, name + SUFFIX)
        return session.save(path, sampler=sampler, metadata={**given, OWN: own})

    def _existing(self, name: str) -> str | None:
        """The file of a session, or None; :class:`SessionNameError` if only the case of another's name is different."""
        path, other = self._look(name)
        if path is None and other is not None:
            raise SessionNameError(
                f"there is a session {other!r} already; {name!r} is the same name to some disks",
                name=name,
                reason=f"there is {other!r}",
            )
        return path

    def _find(self, name: str) -> str:
        """The file of a session that has to be there."""
        path, other = self._look(name)
        if path is None:
            raise _not_found(name, other)
        return path

    def _look(self, name: str) -> tuple[str | None, str | None]:
        """The file of that very name, and a name that some disks take for the same."""
        folded, other = fold(name), None
        for found, entry in session_files(self.folder):
            if found == name:
                return entry.path, None
            if fold(found) == folded:
                other = found
        return None, other

    # --- locks --------------------------------------------------------------------------------------------------------

    def _lock_path(self, name: str) -> str:
        # of what names have in common that some disk takes for one: they cannot be created side by side either
        digest = hashlib.blake2b(fold(name).encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, f".{digest}.lock")

    @contextlib.contextmanager
    def _operation(self, name: str, *, read_only: bool = False) -> Iterator[Held]:
        """Have a name for one operation: against other processes, and against other threads of this one."""
        try:
            held = namelocks.acquire(self._lock_path(name), name=name, timeout=self._timeout, read_only=read_only)
        except StoreLockedError:
            raise StoreLockedError(
                f"another process has the session {name!r}", path=os.path.join(self.folder, name + SUFFIX)
            ) from None
        except OSError as error:
            raise _save_error("lock", os.path.join(self.folder, name + SUFFIX), error) from error
        try:
            with held.mutex:
                yield held
        finally:
            namelocks.drop(held)

    def _check_out(self, name: str, session: Session, held: Held) -> Session:
        again = namelocks.acquire(held.path, name=name)  # this process has it: only counts
        out = [drop for drop in self._out.get(name, ()) if drop.alive]
        drop = weakref.finalize(session, namelocks.drop, again)
        self._out[name] = [*out, drop]
        session._at_close.append(drop)
        return session

    def _remove_litter(self) -> None:
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self.folder)):
                name = litter_of(entry.path)
                if name is not None and name.endswith(SUFFIX):
                    self._remove_temporary(entry.path, name.removesuffix(SUFFIX))
                elif _LOCK.fullmatch(entry.name):
                    with contextlib.suppress(StoreLockedError, OSError):
                        namelocks.drop(namelocks.acquire(entry.path, name=entry.name))

    def _remove_temporary(self, path: str, name: str) -> None:
        """Remove what a save has left, if no process has the name.

        The lock matters where process ids do not tell: in a folder that containers share.
        """
        with contextlib.suppress(StoreLockedError, OSError):
            held = namelocks.acquire(self._lock_path(name), name=name)
            try:
                os.unlink(path)
            finally:
                namelocks.drop(held)


def _not_found(name: str, other: str | None) -> SessionNotFoundError:
    hint = "" if other is None else f"; there is {other!r}"
    return SessionNotFoundError(f"there is no session {name!r}{hint}", name=name)


def _save_error(what: str, path: str, error: Exception) -> SaveError:
    reason = getattr(error, "strerror", None) or str(error)
    return SaveError(f"cannot {what} {path}: {reason}", path=path, reason=reason)
