"""Who waits for a sequence, and how often others have gone before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from llamastate.batch.jobs import Job

__all__ = ["WaitingLine"]


class WaitingLine:
    """Jobs by age. Anyone may leave it, but it is known how many of those who came later went before the first."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._priorities: Counter[int] = Counter()
        self._n_left = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __getitem__(self, key: int) -> Job:
        return self._jobs[key]

    @property
    def first(self) -> Job:
        """Who has waited longest."""
        return next(iter(self))

    @property
    def overtaken(self) -> int:
        """How many that came later have left before the first. All who came earlier have."""
        return self._n_left - self.first.left_before - self.first.ahead

    @property
    def priorities(self) -> set[int]:
        """All that there are."""
        return set(self._priorities)

    def add(self, job: Job) -> None:
        """Join it at the end; ``job.key`` is larger than any before."""
        job.ahead = len(self._jobs)
        job.left_before = self._n_left
        self._enter(job)

    def leave(self, job: Job) -> None:
        """Be admitted, or give up."""
        del self._jobs[job.key]
        self._n_left += 1
        self._priorities[job.priority] -= 1
        if not self._priorities[job.priority]:
            del self._priorities[job.priority]

    def put_back(self, job: Job) -> None:
        """Undo :meth:`leave`: it stands where it stood, and what overtook it counts still."""
        self._n_left -= 1
        self._enter(job)
        self._jobs = dict(sorted(self._jobs.items()))

    def _enter(self, job: Job) -> None:
        self._jobs[job.key] = job
        self._priorities[job.priority] += 1
