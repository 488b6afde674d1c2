"""From entries to the state of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from llamastate.log.chaining import StoredEntry
from llamastate.log.entries import (
    AssistantItems,
    CacheUnlocked,
    ConfigChanged,
    Entry,
    HookInjectedItems,
    Item,
    Kept,
    LlmUsage,
    Locked,
    RunOutcome,
    SessionStart,
    ToolResults,
    TurnEnd,
    UnknownEntry,
    UserInput,
    from_raw,
    plain,
    to_raw,
)

__all__ = ["RestoredState", "StateReference", "fold"]

#: Fields whose content is in the state itself: a kept entry does not repeat them.
_FOLDED = frozenset({"history", "item", "items", "kept"})


class StateReference(msgspec.Struct, frozen=True):
    """A state that was saved, and what it was of.

    Attributes
    ----------
    history_len : int
        Items in the history when it was taken.
    locked_prefix_len : int
        Of them, how many were locked.
    state : dict
        :attr:`Locked.state`.
    """

    history_len: int
    locked_prefix_len: int
    state: dict[str, Any]


class RestoredState(msgspec.Struct):
    """What a session is after its last entry.

    Attributes
    ----------
    system_prompt : str or None
    config : dict or None
    history : list of dict
        All items.
    turn_end : TurnEnd or None
        The last one.
    outcome : RunOutcome or None
        The last one.
    lock : Locked or None
        The last one; None once it was unlocked.
    kept : list of Kept
        Entries that leave something beside the history: usage, states, and whatever a newer version wrote.
    """

    system_prompt: str | None = None
    config: dict[str, Any] | None = None
    history: list[Item] = []
    turn_end: TurnEnd | None = None
    outcome: RunOutcome | None = None
    lock: Locked | None = None
    kept: list[Kept] = []

    @property
    def turn_count(self) -> int:
        """How many turns there have been."""
        return 0 if self.turn_end is None else self.turn_end.turn_count

    @property
    def locked_prefix_len(self) -> int | None:
        """How many items are locked; None if none."""
        return None if self.lock is None else self.lock.locked_prefix_len

    @property
    def usage(self) -> list[LlmUsage]:
        """What each request took, in order."""
        return [e for k in self.kept if isinstance(e := _known(k), LlmUsage)]

    @property
    def states(self) -> list[StateReference]:
        """States that were saved on the way, the newest last."""
        locks = [(k.history_len, _known(k)) for k in self.kept]
        return [
            StateReference(n, e.locked_prefix_len, e.state)
            for n, e in locks
            if isinstance(e, Locked) and e.state is not None
        ]

    @property
    def unknown(self) -> list[Kept]:
        """Entries, whole, of which this version does not understand some or all."""
        return [k for k in self.kept if _is_strange(k)]

    def to_keep(self) -> list[Kept]:
        """What a fork has to take along, so that it restores to an equal state."""
        n = len(self.history)
        more: list[Entry] = []
        if self.turn_end is not None and self._last_kept("turn_end") != self.turn_end:
            more.append(self.turn_end)
        if self.outcome is not None and self._last_kept("run_outcome") != self.outcome:
            more.append(self.outcome)
        # what is kept is folded again: an older lock among it must not come back
        kept_lock = self._last_kept("locked", "cache_unlocked")
        if self.lock is not None and kept_lock != self.lock:
            more.append(self.lock)
        elif self.lock is None and isinstance(kept_lock, Locked):
            more.append(CacheUnlocked(ts=kept_lock.ts))
        return [*self.kept, *(Kept(n, to_raw(entry)) for entry in more)]

    def _last_kept(self, *kinds: str) -> Entry | UnknownEntry | None:
        return next((_known(k) for k in reversed(self.kept) if k.entry["kind"] in kinds), None)


def fold(entries: Iterable[StoredEntry | Entry | UnknownEntry], state: RestoredState | None = None) -> RestoredState:
    """Fold entries to the state that they lead to.

    Parameters
    ----------
    entries : iterable of StoredEntry, Entry or UnknownEntry
    state : RestoredState, optional
        Of the entries before; it is not changed.

    Returns
    -------
    RestoredState
        Folding a log in parts gives the same as folding it at once.

    Raises
    ------
    LogTamperedError
        A stored entry cannot be read.

    Notes
    -----
    O(entries). Items are not copied.
    """
    new = RestoredState()
    if state is not None:
        new = msgspec.structs.replace(state, history=list(state.history), kept=list(state.kept))
    for given in entries:
        if isinstance(given, StoredEntry):
            decoded = given.decoded()
            entry, raw = decoded.entry, decoded.raw
            if raw is None and isinstance(entry, (LlmUsage, Locked)):
                raw = plain(given.data)
        else:
            entry, raw = given, to_raw(given) if isinstance(given, (LlmUsage, Locked)) else None
        step = _STEPS.get(type(entry))
        if step is not None:
            step(new, entry)
        if isinstance(entry, UnknownEntry):
            new.kept.append(Kept(len(new.history), entry.data))
        elif raw is not None and not _leaves_nothing(entry, raw):
            new.kept.append(Kept(len(new.history), {k: v for k, v in raw.items() if k not in _FOLDED}))
    return new


def _leaves_nothing(entry: Entry, raw: dict[str, Any]) -> bool:
    """A lock without a state is in the state already."""
    return isinstance(entry, Locked) and entry.state is None and len(raw) <= 3


def _start(state: RestoredState, entry: SessionStart) -> None:
    state.system_prompt, state.config, state.history = entry.system_prompt, entry.config, list(entry.history)
    state.turn_end = state.outcome = state.lock = None
    state.kept = []
    for kept in entry.kept:
        known = _known(kept)
        if isinstance(known, (TurnEnd, RunOutcome, Locked, CacheUnlocked)):
            _STEPS[type(known)](state, known)
        plainly = isinstance(known, (TurnEnd, RunOutcome, CacheUnlocked)) or (
            isinstance(known, Locked) and known.state is None
        )
        if not plainly or _is_strange(kept):
            state.kept.append(kept)


def _one(state: RestoredState, entry: UserInput) -> None:
    state.history.append(entry.item)


def _many(state: RestoredState, entry: AssistantItems | ToolResults | HookInjectedItems) -> None:
    state.history += entry.items


def _config(state: RestoredState, entry: ConfigChanged) -> None:
    state.config = entry.config


def _turn_end(state: RestoredState, entry: TurnEnd) -> None:
    state.turn_end = entry


def _outcome(state: RestoredState, entry: RunOutcome) -> None:
    state.outcome = entry


def _lock(state: RestoredState, entry: Locked) -> None:
    state.lock = entry


def _unlock(state: RestoredState, entry: CacheUnlocked) -> None:
    state.lock = None


_STEPS: dict[type, Callable[[RestoredState, Any], None]] = {
    SessionStart: _start,
    UserInput: _one,
    AssistantItems: _many,
    ToolResults: _many,
    HookInjectedItems: _many,
    ConfigChanged: _config,
    TurnEnd: _turn_end,
    RunOutcome: _outcome,
    Locked: _lock,
    CacheUnlocked: _unlock,
}


def _known(kept: Kept) -> Entry | UnknownEntry | None:
    try:
        return from_raw(kept.entry).entry
    except ValueError:
        return None  # its items are in the history


def _is_strange(kept: Kept) -> bool:
    try:
        decoded = from_raw(kept.entry)
    except ValueError:
        return True
    return isinstance(decoded.entry, UnknownEntry) or decoded.raw is not None
