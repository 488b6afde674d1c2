"""Checkpoints of a session, and the cheapest exact way back to one.

Full attention can always be trimmed, so a checkpoint of it is a number. A sliding window forgets and a recurrent state
cannot be taken apart: there a checkpoint keeps the partial state, which is small, while the attention rows stay in the
cache. Going back to a point between checkpoints means going back to the one before and decoding the rest again.

Nothing here touches a context: :class:`History` remembers, thins and plans; the session carries plans out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llamastate.errors import HistoryError
from llamastate.exactness import can_trim
from llamastate.words import brief

__all__ = ["Checkpoint", "History", "Plan"]

_ids = count(1)


@dataclass(eq=False)
class Checkpoint:
    """A point of a session's history.

    Attributes
    ----------
    n_tokens : int
        How many tokens the session held.
    label : str or None
        What the caller called it.
    automatic : bool
        Made on the way, to shorten the way back; not a step of :meth:`Session.undo`.
    kind : {"mark", "partial", "full"}
        What is kept: nothing but the number, what cannot be trimmed, or everything.
    created_ns : int
        Nanoseconds since the epoch.
    """

    n_tokens: int
    label: str | None = None
    automatic: bool = False
    kind: str = "mark"
    created_ns: int = field(default_factory=time.time_ns)
    state: Any = field(default=None, repr=False)
    logits: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    id: int = field(default_factory=lambda: next(_ids))
    #: The state again, if it is known to be what it says: taken by the session itself, or validated when it was loaded.
    sound: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        label = "" if self.label is None else f", label={brief(self.label)}"  # which may be of any length
        automatic = ", automatic" if self.automatic else ""
        return f"<llamastate.Checkpoint {self.n_tokens} tokens{label}, {self.kind}{automatic}, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        held = 0 if self.state is None else memoryview(self.state).nbytes
        return held + (0 if self.logits is None else self.logits.nbytes)

    def forget_state(self) -> None:
        """Become a mark: it can still be gone back to, by decoding again."""
        self.kind, self.state, self.logits, self.sound = "mark", None, None, None


class Plan(NamedTuple):
    """How to make a sequence hold the first ``n_tokens`` tokens.

    Attributes
    ----------
    way : {"nothing", "trim", "partial", "full", "scratch"}
        The first step: leave, trim, set a checkpoint's state, or empty the sequence.
    base : int
        How many tokens the sequence holds after it.
    replay : int
        How many are decoded again after that.
    checkpoint : Checkpoint or None
        Whose state is set.
    """

    way: str
    base: int
    replay: int
    checkpoint: Checkpoint | None = None


class History:
    """The checkpoints of one session, in order of their token counts.

    Parameters
    ----------
    kind : str
        :attr:`Model.memory_kind`.
    n_swa : int
        Width of the sliding window.
    max_checkpoints : int
        How many states are kept.
    max_bytes : int
        How many bytes they may take.

    Notes
    -----
    Past either bound states are let go, automatic ones first, so that what remains is dense near the end and sparser
    the further back. A checkpoint that the caller made stays as a mark.
    """

    def __init__(self, kind: str, n_swa: int, *, max_checkpoints: int, max_bytes: int) -> None:
        self._kind = kind
        self._n_swa = n_swa
        self._max_checkpoints = max_checkpoints
        self._max_bytes = max_bytes
        self._points: list[Checkpoint] = []

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    @property
    def needs_states(self) -> bool:
        """Whether a checkpoint has to keep a state: not where everything can be trimmed."""
        return self._kind not in ("attention", "none")

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(p.nbytes for p in self._points)

    def named(self) -> tuple[Checkpoint, ...]:
        """Those that the caller made, oldest first."""
        return tuple(p for p in self._points if not p.automatic)

    def copy(self) -> History:
        """An independent history with the same checkpoints; states are shared, for they never change."""
        other = History(self._kind, self._n_swa, max_checkpoints=self._max_checkpoints, max_bytes=self._max_bytes)
        other._points = [
            Checkpoint(p.n_tokens, p.label, p.automatic, p.kind, p.created_ns, p.state, p.logits, sound=p.sound)
            for p in self._points
        ]
        return other

    # --- keeping ------------------------------------------------------------------------------------------------------

    def add(self, point: Checkpoint, *, n_past: int) -> None:
        """Remember a checkpoint, and thin the others if there are too many now."""
        at = next((i for i, p in enumerate(self._points) if p.n_tokens > point.n_tokens), len(self._points))
        self._points.insert(at, point)
        self.thin(n_past)

    def replace(self, points: Sequence[Checkpoint]) -> None:
        """Take over the checkpoints of a saved session."""
        self._points = sorted(points, key=lambda p: p.n_tokens)

    def forget_states(self) -> None:
        """Keep the caller's checkpoints as marks: what the states are of has changed."""
        self._points = list(self.named())
        for point in self._points:
            point.forget_state()

    def last_whole(self, n_tokens: int) -> Checkpoint | None:
        """The last checkpoint at or before ``n_tokens`` that needs nothing else to be restored."""
        whole = (p for p in reversed(self._points) if p.kind == "full" or self._kind == "recurrent")
        return next((p for p in whole if p.state is not None and p.n_tokens <= n_tokens), None)

    def drop_after(self, n_tokens: int) -> None:
        """Forget what lies past ``n_tokens``: other tokens are about to take that place."""
        self._points = [p for p in self._points if p.n_tokens <= n_tokens]

    def at(self, n_tokens: int) -> Checkpoint | None:
        """A checkpoint with a state at exactly this many tokens, if there is one."""
        return next((p for p in self._points if p.n_tokens == n_tokens and p.state is not None), None)

    def thin(self, n_past: int) -> None:
        """Let states go until both bounds hold."""
        while True:
            held = [p for p in self._points if p.state is not None]
            if len(held) <= self._max_checkpoints and sum(p.nbytes for p in held) <= self._max_bytes:
                return
            if not held:
                return
            victim = self._victim(held, n_past)
            if victim.automatic:
                self._points.remove(victim)
            else:
                victim.forget_state()

    def _victim(self, held: list[Checkpoint], n_past: int) -> Checkpoint:
        """The state that is missed least: with close neighbours, measured against how far back it lies."""
        candidates = [p for p in held if p.automatic] or held
        end = max(n_past, held[-1].n_tokens)  # what was undone has checkpoints past the present

        def loss(point: Checkpoint) -> float:
            i = held.index(point)
            before = held[i - 1].n_tokens if i else 0
            after = held[i + 1].n_tokens if i + 1 < len(held) else end
            return (after - before) / (end - point.n_tokens + 1)

        return min(candidates, key=loss)

    # --- planning -----------------------------------------------------------------------------------------------------

    def plan_back(self, n_tokens: int, *, n_past: int, pos_min: int) -> Plan:
        """The cheapest exact way to fewer tokens.

        Parameters
        ----------
        n_tokens : int
            Where to.
        n_past : int
            How many tokens the sequence holds.
        pos_min : int
            ``seq_pos_min`` of the sequence.
        """
        if n_tokens == n_past:
            return Plan("nothing", n_past, 0)
        if n_tokens == 0 or can_trim(self._kind, self._n_swa, pos_min, n_past - 1, n_tokens):
            return Plan("trim", n_tokens, 0)
        return self._from_state(n_tokens, rows=n_past) or Plan("scratch", 0, n_tokens)

    def plan_forward(self, n_tokens: int, *, n_past: int) -> Plan:
        """The cheapest exact way to more tokens, all of which were decoded before (redo)."""
        plan = self._from_state(n_tokens, rows=n_past)
        if plan is not None and plan.base > n_past:
            return plan
        return Plan("nothing", n_past, n_tokens - n_past)

    def _from_state(self, n_tokens: int, *, rows: int) -> Plan | None:
        """From the last state at or before ``n_tokens`` that can be set onto a sequence of ``rows`` tokens."""
        for point in reversed(self._points):
            if point.state is None or point.n_tokens > n_tokens:
                continue
            # a partial state needs the attention rows of all tokens before it; a recurrent one is everything there is
            if point.kind == "full" or self._kind == "recurrent" or point.n_tokens <= rows:
                return Plan(point.kind, point.n_tokens, n_tokens - point.n_tokens, point)
        return None

    def undo_targets(self, n: int, n_past: int) -> list[Checkpoint]:
        """The last ``n`` of the caller's checkpoints before where the session is, the latest first.

        Several at one point are one step.

        Raises
        ------
        HistoryError
            There are fewer.
        """
        found: list[Checkpoint] = []
        at = n_past
        for point in reversed(self._points):
            if not point.automatic and point.n_tokens < at:
                found.append(point)
                at = point.n_tokens
                if len(found) == n:
                    return found
        if not found:
            reason = "there are no checkpoints to go back to; call checkpoint() first"
        else:
            reason = f"cannot undo {n} steps: there are {len(found)}"
        raise HistoryError(reason, asked=n, available=len(found))
