"""Session logs for asyncio: the same operations in a thread, so that the loop goes on while the store waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from llamastate.log.chaining import StoredEntry
from llamastate.log.entries import Entry, UnknownEntry
from llamastate.log.folding import RestoredState
from llamastate.log.sessionlog import SessionLog
from llamastate.log.store import LogInfo, LogStore
from llamastate.sessionio import in_thread

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncSessionLog"]

_T = TypeVar("_T")


class AsyncSessionLog:
    """A :class:`SessionLog` whose operations are awaited; arguments, results and errors are the same.

    Parameters
    ----------
    log : SessionLog
        Can go on being used itself.

    Notes
    -----
    A task that is cancelled waits for what is under way: it is recorded or not, and :attr:`head_hash` says so.
    """

    def __init__(self, log: SessionLog) -> None:
        self.log = log

    @classmethod
    async def create(cls, store: LogStore, **start: Any) -> Self:
        """:meth:`SessionLog.create`."""
        return cls(await _run(lambda: SessionLog.create(store, **start)))

    @classmethod
    async def open(cls, store: LogStore, session_id: str) -> Self:
        """:meth:`SessionLog.open`."""
        return cls(await _run(lambda: SessionLog.open(store, session_id)))

    @property
    def id(self) -> str:
        """Of the session."""
        return self.log.id

    @property
    def head_hash(self) -> str:
        """The hash of the last entry that this object knows of."""
        return self.log.head_hash

    @property
    def n_entries(self) -> int:
        """How many entries there are up to it."""
        return self.log.n_entries

    def __repr__(self) -> str:
        return f"<llamastate.log.AsyncSessionLog of {self.log!r}>"

    async def info(self) -> LogInfo:
        """:meth:`SessionLog.info`."""
        return await _run(self.log.info)

    async def entries(self) -> list[StoredEntry]:
        """:meth:`SessionLog.entries`, all at once."""
        return await _run(lambda: list(self.log.entries()))

    async def restore(self) -> RestoredState:
        """:meth:`SessionLog.restore`."""
        return await _run(self.log.restore)

    async def verify(self, *, head_hash: str | None = None) -> int:
        """:meth:`SessionLog.verify`."""
        return await _run(lambda: self.log.verify(head_hash=head_hash))

    async def append(self, *entries: Entry | UnknownEntry) -> str:
        """:meth:`SessionLog.append`."""
        return await _run(lambda: self.log.append(*entries))

    async def save_delta(self, items: Iterable[Any]) -> str:
        """:meth:`SessionLog.save_delta`."""
        given = list(items) if not isinstance(items, (str, bytes, Mapping)) else items
        return await _run(lambda: self.log.save_delta(given))

    async def save_turn_end(self, turn_count: int) -> str:
        """:meth:`SessionLog.save_turn_end`."""
        return await _run(lambda: self.log.save_turn_end(turn_count))

    async def save_outcome(self, outcome: Any, interrupted: bool = False) -> str:
        """:meth:`SessionLog.save_outcome`."""
        return await _run(lambda: self.log.save_outcome(outcome, interrupted))

    async def save_usage(self, *counts: int, **named: int) -> str:
        """:meth:`SessionLog.save_usage`."""
        return await _run(lambda: self.log.save_usage(*counts, **named))

    async def save_cache_locked(self, locked_prefix_len: int, *, state: Mapping[str, Any] | None = None) -> str:
        """:meth:`SessionLog.save_cache_locked`."""
        return await _run(lambda: self.log.save_cache_locked(locked_prefix_len, state=state))

    async def save_cache_unlocked(self) -> str:
        """:meth:`SessionLog.save_cache_unlocked`."""
        return await _run(self.log.save_cache_unlocked)

    async def save_config_changed(self, config: Mapping[str, Any] | None) -> str:
        """:meth:`SessionLog.save_config_changed`."""
        return await _run(lambda: self.log.save_config_changed(config))

    async def refresh(self) -> bool:
        """:meth:`SessionLog.refresh`."""
        return await _run(self.log.refresh)

    async def ensure_head_or_fork(self) -> bool:
        """:meth:`SessionLog.ensure_head_or_fork`."""
        return await _run(self.log.ensure_head_or_fork)

    async def fork(self, *, session_id: str | None = None) -> Self:
        """:meth:`SessionLog.fork`."""
        return type(self)(await _run(lambda: self.log.fork(session_id=session_id)))

    async def fork_at(self, at_hash: str, *, session_id: str | None = None) -> Self:
        """:meth:`SessionLog.fork_at`."""
        return type(self)(await _run(lambda: self.log.fork_at(at_hash, session_id=session_id)))

    async def compact(self, history: Iterable[Any], **start: Any) -> Self:
        """:meth:`SessionLog.compact`."""
        return type(self)(await _run(lambda: self.log.compact(history, **start)))


async def _run(operation: Callable[[], _T]) -> _T:
    return await in_thread(lambda stopped: operation())
