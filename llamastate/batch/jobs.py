"""What the scheduler speaks of: the rules, the jobs, and what is to be done with sequences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from llamastate.arrays import Int32Array
from llamastate.batch.cells import Holder

__all__ = [
    "Action",
    "Begin",
    "Copy",
    "Drop",
    "Fork",
    "Job",
    "Kept",
    "Load",
    "Park",
    "Phase",
    "Row",
    "Rules",
    "Source",
    "Unpark",
]


@dataclass(frozen=True)
class Rules:
    """What the scheduler has to go by.

    Parameters
    ----------
    n_slots : int
        Sequences that can run at once; their ids are ``[0, n_slots)``.
    n_spare : int
        Sequences that can keep prefixes which nobody runs; their ids follow.
    n_cells : int or None
        Cells for all of them; None where each has its own.
    max_tokens : int
        The most that one sequence may hold.
    budget : int
        Tokens of one decode.
    fork_anywhere : bool
        Whether a sequence can be forked before its end. Windows and recurrent states can not: there a sequence stops
        where others part from it, is forked, and goes on.
    min_share : int
        Common prefixes shorter than this are not worth waiting for.
    reserve : int
        Cells that a request must find free beyond its prompt, at most: what it generates beyond that may have to be
        made room for by parking others.
    patience : int
        A request is overtaken by so many later ones, and then by no more.
    grid : int or None
        The same shapes whatever the company: chunks of a prompt end at multiples of this and go alone, and so does
        every step of all that generate.
    tiled : bool
        Whether rows are computed in tiles where a batch has many: see :func:`~llamastate.batch.rows.tiles_are_dear`.
    """

    n_slots: int
    n_spare: int
    n_cells: int | None
    max_tokens: int
    budget: int
    fork_anywhere: bool = True
    min_share: int = 1
    reserve: int = 256
    patience: int = 128
    grid: int | None = None
    tiled: bool = False


class Phase(IntEnum):
    """Where a job stands."""

    WAITING = 0  # for a sequence
    PLACED = 1  # has one, and waits until its source has come to where they part
    PROMPT = 2
    GENERATE = 3
    PARKED = 4  # out of the context, to come back
    DONE = 5


class Kept(Holder):
    """A prefix on a spare sequence."""

    __slots__ = ("key", "seq", "tokens", "used")

    def __init__(self, key: int, seq: int, tokens: Int32Array, used: int) -> None:
        super().__init__()
        self.key = key
        self.seq = seq
        self.tokens = tokens
        self.used = used


class Job(Holder):
    """One sequence to be generated.

    Parameters
    ----------
    tokens : int32[n]
        The prompt, not empty.
    limit : int
        New tokens at most.
    priority : int
    share : bool
        Whether it may begin with what others have computed.
    twin_of : Job, optional
        The job of the same prompt whose logits this one begins with.
    """

    __slots__ = (
        "admitted",
        "ahead",
        "fork_at",
        "gave_way",
        "key",
        "left_before",
        "limit",
        "made",
        "phase",
        "preemptions",
        "preserved",
        "priority",
        "prompt_done",
        "seq",
        "share",
        "shared_at",
        "source",
        "stops",
        "tokens",
        "twin_of",
    )

    def __init__(
        self, tokens: Int32Array, limit: int, *, priority: int = 0, share: bool = True, twin_of: Job | None = None
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.limit = limit
        self.priority = priority
        self.share = share
        self.twin_of = twin_of
        self.key = -1
        self.seq = -1
        self.phase = Phase.WAITING
        #: New tokens chosen. The last one is not in the context yet.
        self.made = 0
        self.prompt_done = False
        self.preemptions = 0
        #: Tokens in the state of one that is parked.
        self.preserved = 0
        #: The order of admissions.
        self.admitted = -1
        #: Who waited before it, and how many had left the queue then.
        self.ahead = 0
        self.left_before = 0
        #: It was admitted and had to leave again before anything of it was computed.
        self.gave_way = False
        self.source: Source | None = None
        self.fork_at = 0
        #: Lengths at which it has to stand for others to fork it.
        self.stops: list[int] = []
        #: The longest prefix that it had in common with another.
        self.shared_at = 0

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @property
    def to_come(self) -> int:
        """Tokens that are still to be decoded, at most."""
        return self.prompt_to_come + max(0, self.limit - self.made - 1)

    @property
    def prompt_to_come(self) -> int:
        """Tokens of the prompt that are still to be decoded, and not by others."""
        held = self.fork_at if self.source is not None else self.held
        return max(0, self.n_prompt - held)


Source: TypeAlias = "Job | Kept"


class Drop(NamedTuple):
    """Empty a sequence."""

    seq: int


class Copy(NamedTuple):
    """Make the empty sequence ``dest`` share the first ``n`` tokens of ``seq``."""

    seq: int
    dest: int
    n: int


class Fork(NamedTuple):
    """The same for a job, which begins with them."""

    job: Job
    seq: int
    n: int


class Begin(NamedTuple):
    """A twin holds all of its prompt: choose its first token from the logits that are known."""

    job: Job


class Load(NamedTuple):
    """Put the first ``n`` tokens of a job's prompt into its sequence from the store; then :meth:`Scheduler.loaded`."""

    job: Job
    n: int


class Park(NamedTuple):
    """Take a job's state out of the context; its sequence is given to others."""

    job: Job
    seq: int


class Unpark(NamedTuple):
    """Put it back, into ``job.seq``."""

    job: Job


Action: TypeAlias = Drop | Copy | Fork | Begin | Load | Park | Unpark


class Row(NamedTuple):
    """Tokens ``[start, end)`` of a job go into the batch."""

    job: Job
    start: int
    end: int
