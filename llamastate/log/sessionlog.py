"""One session's log: everything that happened in it, in order, each entry sealing all before it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from llamastate.arrays import as_index
from llamastate.errors import EntryNotFoundError, InvalidArgumentError, SessionNotFoundError
from llamastate.log.chaining import StoredEntry, chain, checked, is_hash, tampered
from llamastate.log.entries import (
    CacheUnlocked,
    ConfigChanged,
    Entry,
    Kept,
    LlmUsage,
    Locked,
    RunOutcome,
    SessionOrigin,
    SessionStart,
    TurnEnd,
    UnknownEntry,
    encode,
    now_ms,
    to_raw,
)
from llamastate.log.folding import RestoredState, fold
from llamastate.log.items import as_items, group
from llamastate.log.store import LogInfo, LogStore, read_all
from llamastate.names import check_name

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SessionLog", "new_session_id"]

_KEEP: Any = object()


class SessionLog:
    """The log of one session, and where it ended when this object last looked. Made by :meth:`create` or :meth:`open`.

    Every ``save_`` method appends to that end, which is compared in the same step: it raises :class:`HeadMovedError`
    and records nothing if somebody else has been there. Who gets that can :meth:`refresh` and decide anew, or go on
    apart with :meth:`ensure_head_or_fork`. Each returns the new head's hash. Threads take turns.

    Examples
    --------
    >>> from llamastate.log import MemoryLogStore, SessionLog
    >>> log = SessionLog.create(MemoryLogStore(), system_prompt="Be brief.")
    >>> _ = log.save_delta([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}])
    >>> _ = log.save_turn_end(1)
    >>> [item["content"] for item in log.restore().history]
    ['Hi!', 'Hello.']
    """

    #: Where the log is.
    store: LogStore
    _id: str
    _n: int
    _head: str
    _lock: threading.RLock  # type: ignore[valid-type,unused-ignore]

    def __init__(self) -> None:
        raise TypeError("use SessionLog.create() or SessionLog.open()")

    @classmethod
    def _new(cls, store: LogStore, session_id: str, n_entries: int, head_hash: str) -> Self:
        self = cls.__new__(cls)
        self.store = store
        self._id, self._n, self._head = session_id, n_entries, head_hash
        self._lock = threading.RLock()
        return self

    @classmethod
    def create(
        cls,
        store: LogStore,
        *,
        system_prompt: str | None = None,
        config: Mapping[str, Any] | None = None,
        history: Iterable[Any] = (),
        session_id: str | None = None,
    ) -> Self:
        """Begin a session.

        Parameters
        ----------
        store : LogStore
        system_prompt : str, optional
        config : mapping, optional
            How the model is asked; JSON types.
        history : iterable of items
            That it begins with; see :meth:`save_delta`.
        session_id : str, optional
            A name that could be a file's; made up if not given, such that ids sort by time.

        Raises
        ------
        SessionExistsError
            There is a session of that id.
        SessionNameError, InvalidArgumentError
            The id, or something in the rest, cannot be recorded.
        """
        start = SessionStart(
            system_prompt=_prompt(system_prompt), config=_config(config), history=as_items(history, "history")
        )
        return cls._begin(store, start, session_id)

    @classmethod
    def _begin(cls, store: LogStore, start: SessionStart, session_id: str | None) -> Self:
        name = new_session_id() if session_id is None else check_name(session_id)
        entries = chain([start])
        store.create(name, entries)
        return cls._new(store, name, 1, entries[0].hash)

    @classmethod
    def open(cls, store: LogStore, session_id: str) -> Self:
        """Go on with a session.

        Raises
        ------
        SessionNotFoundError
        """
        if not isinstance(session_id, str):
            raise SessionNotFoundError(f"no session {session_id!r:.120}", name=str(session_id))
        name = check_name(session_id)
        return cls._new(store, name, *store.head(name))

    # --- facts --------------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Of the session."""
        return self._id

    @property
    def head_hash(self) -> str:
        """The hash of the last entry that this object knows of."""
        return self._head

    @property
    def n_entries(self) -> int:
        """How many entries there are up to it."""
        return self._n

    def __repr__(self) -> str:
        return f"<llamastate.log.SessionLog {self._id!r}, {self._n} entries, head {self._head[:12]}>"

    def info(self) -> LogInfo:
        """What the store tells of the session."""
        return self.store.info(self._id)

    def entries(self) -> Iterator[StoredEntry]:
        """All entries up to :attr:`head_hash`, read as they are used; nothing is verified."""
        return read_all(self.store, self._id, stop=self._n)

    def restore(self) -> RestoredState:
        """Fold the entries up to :attr:`head_hash`.

        Returns
        -------
        RestoredState
            System prompt, configuration, history, turns, usage, lock.

        Raises
        ------
        LogTamperedError
            The chain does not hold: no state is made of changed entries.
        """
        with self._lock:
            n, head = self._n, self._head
        return self._folded(n, head)

    def _folded(self, n: int, head: str) -> RestoredState:
        return fold(checked(read_all(self.store, self._id, stop=n), n_entries=n, head_hash=head))

    def verify(self, *, head_hash: str | None = None) -> int:
        """Read the whole log, what others have added too, and compare every hash.

        Parameters
        ----------
        head_hash : str, optional
            A head that was noted elsewhere. It has to be in the chain: whoever can write to the store can also cut a
            log short, or write another that holds in itself.

        Returns
        -------
        int
            How many entries there are.

        Raises
        ------
        LogTamperedError
            ``index`` is the first entry that does not hold.

        Notes
        -----
        O(bytes), about 1 GB/s.
        """
        before = self.store.head(self._id)
        n, at_record, noted = 0, "", head_hash is None
        for stored in checked(read_all(self.store, self._id)):
            n += 1
            if n == before.n_entries:
                at_record = stored.hash
            noted = noted or stored.hash == head_hash
        after = self.store.head(self._id)
        # others may append while this reads; so the first count is the least there has to be, the second the most
        if n < before.n_entries:
            raise tampered(n, f"entry {n} is missing: there should be {before.n_entries}")
        if n > after.n_entries:
            raise tampered(max(after.n_entries, 0), f"there should be {after.n_entries} entries, and there are {n}")
        if at_record != before.hash:
            last = max(before.n_entries - 1, 0)
            raise tampered(last, f"entry {last} has the hash {at_record}, and the record says {before.hash}")
        if not noted:
            raise tampered(max(n - 1, 0), f"no entry has the hash {head_hash}: the log was cut short or written anew")
        return n

    # --- going on -----------------------------------------------------------------------------------------------------

    def append(self, *entries: Entry | UnknownEntry) -> str:
        """Record entries of any kind, all or none; the other methods do it through this one.

        Returns
        -------
        str
            The new head's hash.

        Raises
        ------
        HeadMovedError
            Somebody else has appended; nothing is recorded.
        InvalidArgumentError
            An entry holds something that would not come back the same, or would begin a session.
        """
        for entry in entries:
            if not isinstance(entry, (Entry, UnknownEntry)):
                raise InvalidArgumentError(f"{type(entry).__name__} is no entry", name="entries", value=entry)
            if entry.kind == "session_start":
                raise InvalidArgumentError("a session starts once", name="entries", value=entry.kind)
        data = [encode(entry) for entry in entries]
        if data:
            with self.transaction():
                stored = chain(data, index=self._n, prev_hash=self._head)
                self.store.append(self._id, stored)
                self._n, self._head = stored[-1].index + 1, stored[-1].hash
        return self._head

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is saved inside the block is recorded at its end: all of it, or nothing.

        Much faster than one by one: the store waits for the disk and for others once.
        """
        # The store's turn comes before this log's, here and wherever both are needed: threads that write to several
        # logs in one block would else wait for each other for ever.
        after: tuple[int, str] | None = None
        try:
            with self.store.transaction(), self._lock:
                before = self._n, self._head
                try:
                    yield
                except BaseException:
                    self._n, self._head = before
                    raise
                after = self._n, self._head
        except BaseException:
            with self._lock:
                if after == (self._n, self._head):  # it was the end that failed
                    self._n, self._head = before
            raise

    def save_delta(self, items: Iterable[Any]) -> str:
        """Record items that the history has gained, in order, all or none.

        Parameters
        ----------
        items : iterable of items
            Messages, tool calls, tool results, reasoning, others: dicts of JSON types, or msgspec structs and
            dataclasses, which become such. They come back as they are. Which entries they make:
            :func:`llamastate.log.group`.

        Raises
        ------
        HeadMovedError, InvalidArgumentError
            Nothing is recorded.
        """
        return self.append(*group(as_items(items), now_ms()))

    def save_turn_end(self, turn_count: int) -> str:
        """Record that a turn is over, and how many there have been."""
        return self.append(TurnEnd(_count("turn_count", turn_count)))

    def save_outcome(self, outcome: Any, interrupted: bool = False) -> str:
        """Record how a run has ended: the caller's word for it (JSON types), and whether it was interrupted."""
        return self.append(RunOutcome(outcome, bool(interrupted)))

    def save_usage(
        self,
        history_len: int,
        input_total_tokens: int = 0,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        output_tokens: int = 0,
    ) -> str:
        """Record what one request to the model took.

        Parameters
        ----------
        history_len : int
            Items that were sent.
        input_total_tokens : int
            The whole prompt.
        cache_read_tokens, cache_write_tokens : int
            Of these, how many came from a cache, and how many were put into one.
        output_tokens : int
        """
        numbers = {
            "history_len": history_len,
            "input_total_tokens": input_total_tokens,
            "cache_read_tokens": cache_read_tokens,
            "cache_write_tokens": cache_write_tokens,
            "output_tokens": output_tokens,
        }
        return self.append(LlmUsage(**{name: _count(name, n) for name, n in numbers.items()}))

    def save_cache_locked(self, locked_prefix_len: int, *, state: Mapping[str, Any] | None = None) -> str:
        """Record that the beginning of the history is fixed from now on.

        Parameters
        ----------
        locked_prefix_len : int
            How many items.
        state : mapping, optional
            Where its state is; :func:`llamastate.log.lock_session` saves one and records it.
        """
        given = None if state is None else dict(state)
        return self.append(Locked(_count("locked_prefix_len", locked_prefix_len), given))

    def save_cache_unlocked(self) -> str:
        """Record that the history may change from its beginning on again."""
        return self.append(CacheUnlocked())

    def save_config_changed(self, config: Mapping[str, Any] | None) -> str:
        """Record another configuration, JSON types."""
        return self.append(ConfigChanged(_config(config)))

    # --- others -------------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Look where the log ends now; whether somebody has appended."""
        while True:
            before = self._n, self._head
            found = self.store.head(self._id)
            with self._lock:
                if (self._n, self._head) == before:  # else another thread has saved meanwhile
                    self._n, self._head = found
                    return found.hash != before[1]

    def ensure_head_or_fork(self) -> bool:
        """If somebody has appended, go on apart: as a fork from the last entry that this object knows of.

        Returns
        -------
        bool
            Whether it was forked; :attr:`id` and :attr:`head_hash` are the fork's then.
        """
        if self.store.head(self._id).hash == self._head:
            return False
        with self.store.transaction(), self._lock:
            if self.store.head(self._id).hash == self._head:
                return False  # another thread has done it
            fork = self.fork()
        with self._lock:
            self._id, self._n, self._head = fork._id, fork._n, fork._head
        return True

    def fork(self, *, session_id: str | None = None) -> Self:
        """Begin another session that has everything up to :attr:`head_hash`.

        Parameters
        ----------
        session_id : str, optional
            As for :meth:`create`.

        Returns
        -------
        SessionLog
            It restores to an equal state, and records where it comes from (``forked_from``).
        """
        with self._lock:
            n, head = self._n, self._head
        return self._fork(n, head, session_id)

    def fork_at(self, at_hash: str, *, session_id: str | None = None) -> Self:
        """Begin another session that has everything up to an entry, that included.

        Parameters
        ----------
        at_hash : str
            Its hash.
        session_id : str, optional
            As for :meth:`create`.

        Raises
        ------
        EntryNotFoundError
            No entry of this session has that hash.
        LogTamperedError
            The chain does not hold up to there.
        """
        index = self.store.find(self._id, at_hash) if is_hash(at_hash) else None
        if index is None:
            raise EntryNotFoundError(
                f"no entry of session {self._id!r} has the hash {at_hash!r:.80}", session=self._id, hash=at_hash
            )
        return self._fork(index + 1, at_hash, session_id)

    def _fork(self, n: int, at_hash: str, session_id: str | None) -> Self:
        state = self._folded(n, at_hash)
        start = SessionStart(
            system_prompt=state.system_prompt,
            config=state.config,
            history=state.history,
            forked_from=SessionOrigin(self._id, at_hash),
            kept=state.to_keep(),
        )
        return self._begin(self.store, start, session_id)

    def compact(
        self,
        history: Iterable[Any],
        *,
        system_prompt: str | None = _KEEP,
        config: Mapping[str, Any] | None = _KEEP,
        session_id: str | None = None,
    ) -> Self:
        """Begin another session that goes on from here with a shorter history.

        Parameters
        ----------
        history : iterable of items
            To go on with, such as a summary and the last turn.
        system_prompt, config
            As they are, if not given.
        session_id : str, optional
            As for :meth:`create`.

        Returns
        -------
        SessionLog
            It records where it comes from (``compacted_from``) and goes on counting turns. Usage and states of the old
            history stay with the old session.
        """
        with self._lock:
            n, head = self._n, self._head
        state = self._folded(n, head)
        origin = SessionOrigin(self._id, head)
        turns = [] if state.turn_end is None else [Kept(0, to_raw(state.turn_end))]
        start = SessionStart(
            system_prompt=state.system_prompt if system_prompt is _KEEP else _prompt(system_prompt),
            config=state.config if config is _KEEP else _config(config),
            history=as_items(history, "history"),
            compacted_from=origin,
            kept=turns,
        )
        return self._begin(self.store, start, session_id)


def new_session_id() -> str:
    """Make up an id: a UUID of version 7, so that ids sort by the millisecond in which they were made."""
    value = now_ms() << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62
    return str(uuid.UUID(int=value & (1 << 128) - 1))


def _count(name: str, value: object) -> int:
    number = as_index(value, name, InvalidArgumentError)
    if number < 0:
        raise InvalidArgumentError(f"{name} = {number} is negative", name=name, value=number, limit=0)
    return number


def _prompt(text: object) -> str | None:
    if text is not None and not isinstance(text, str):
        raise InvalidArgumentError(
            f"system_prompt is {type(text).__name__}, not text", name="system_prompt", value=text
        )
    return text


def _config(config: object) -> dict[str, Any] | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, msgspec.Struct) or (dataclasses.is_dataclass(config) and not isinstance(config, type)):
        built = msgspec.to_builtins(config)
        if isinstance(built, dict):
            return built
    raise InvalidArgumentError(f"config is {type(config).__name__}, not a mapping", name="config", value=config)
