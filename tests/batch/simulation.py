"""A context that computes nothing, for the scheduler to be tried on: it knows who holds which tokens in which cells."""

from __future__ import annotations

from itertools import count

import numpy as np

from llamastate.batch.jobs import Begin, Copy, Drop, Fork, Job, Load, Park, Phase, Rules, Unpark
from llamastate.batch.scheduler import Scheduler


class Simulation:
    """Carries plans out, and objects to whatever could not be done exactly on a real context."""

    def __init__(self, rules: Rules, *, stored: dict[Job, int] | None = None) -> None:
        self.rules = rules
        self.scheduler = Scheduler(rules, None if stored is None else lambda job: stored.get(job, 0))
        #: Of every sequence, its (cell, token)s.
        self.held: dict[int, list[tuple[int, int]]] = {}
        self.parked: dict[Job, list[int]] = {}
        #: Cells are never used again here: only how many there are at once matters.
        self._cells = count()
        self.admissions: list[Job] = []
        self.done: list[Job] = []
        self.computed = 0
        self.loaded = 0
        self.decodes = 0
        #: Batches of both prompts and steps.
        self.n_mixed = 0
        self._seen: set[Job] = set()

    def add(self, tokens: list[int], limit: int = 4, **fields: object) -> Job:
        job = Job(np.array(tokens, np.int32), limit, **fields)  # type: ignore[arg-type]
        self.scheduler.add(job)
        return job

    @property
    def used(self) -> int:
        return len({cell for held in self.held.values() for cell, _ in held})

    def tokens_of(self, seq: int) -> list[int]:
        return [token for _, token in self.held.get(seq, [])]

    def text_of(self, job: Job) -> list[int]:
        """What a job holds or is to hold; every new token is -1 less than its number."""
        return [*job.tokens.tolist(), *(-1 - i for i in range(job.limit))]

    def step(self) -> None:
        scheduler = self.scheduler
        for action in scheduler.plan():
            self.carry_out(action)
        self.note_admissions()
        if self.rules.n_cells is not None:
            assert scheduler.cells.used == self.used
        rows = scheduler.rows
        assert sum(end - start for _, start, end in rows) <= self.rules.budget
        for job, start, end in rows:
            held = self.held.setdefault(job.seq, [])
            assert len(held) == start == job.held
            assert end <= job.n_prompt or end == start + 1
            held.extend((next(self._cells), token) for token in self.text_of(job)[start:end])
            self.computed += end - start
            assert self.tokens_of(job.seq) == self.text_of(job)[:end]
        self.decodes += bool(rows)
        self.n_mixed += len({start < job.n_prompt for job, start, _ in rows}) > 1
        if self.rules.n_cells is not None:
            assert self.used <= self.rules.n_cells
        assert rows or not scheduler.running, "somebody runs and nothing is decoded"
        scheduler.decoded()
        for job, _, end in rows:
            if end >= job.n_prompt:
                self.choose(job)

    def choose(self, job: Job) -> None:
        if job.limit:
            self.scheduler.chosen(job)
        if job.made >= job.limit or job.held >= self.rules.max_tokens:
            self.done.append(job)
            for action in self.scheduler.finish(job):
                self.carry_out(action)

    def note_admissions(self) -> None:
        fresh = [job for job in [*self.scheduler.running.values(), *self.done] if job not in self._seen]
        for job in sorted(fresh, key=lambda job: job.admitted):
            self.admissions.append(job)
            self._seen.add(job)

    def carry_out(self, action: object) -> None:
        held = self.held
        if isinstance(action, (Fork, Copy)):
            dest = action.job.seq if isinstance(action, Fork) else action.dest
            assert dest != action.seq
            assert not held.get(dest)
            source = held[action.seq]
            assert len(source) >= action.n
            if not self.rules.fork_anywhere:
                assert len(source) == action.n
            held[dest] = source[: action.n]
            if isinstance(action, Fork):
                assert self.tokens_of(dest) == self.text_of(action.job)[: action.n]
        elif isinstance(action, Begin):
            assert self.tokens_of(action.job.seq) == action.job.tokens.tolist()
            assert action.job.twin_of is not None
            assert action.job.twin_of.prompt_done
            self.choose(action.job)
        elif isinstance(action, Drop):
            held[action.seq] = []
        elif isinstance(action, Load):
            assert not held.get(action.job.seq)
            held[action.job.seq] = [(next(self._cells), t) for t in action.job.tokens[: action.n].tolist()]
            self.scheduler.loaded(action.job, action.n)
            self.loaded += action.n
        elif isinstance(action, Park):
            self.parked[action.job] = self.tokens_of(action.seq)
            assert len(self.parked[action.job]) == action.job.held
            held[action.seq] = []
        elif isinstance(action, Unpark):
            assert not held.get(action.job.seq)
            held[action.job.seq] = [(next(self._cells), t) for t in self.parked.pop(action.job)]
        else:
            raise TypeError(action)

    def run(self, *, most: int = 100_000) -> None:
        """Step until nothing is left."""
        for _ in range(most):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle
        assert all(job.phase is Phase.DONE for job in self.done)
        kept = {k.seq for k in self.scheduler.kept.values()}
        assert {seq for seq, held in self.held.items() if held} == kept
