"""What goes into the next batch: policy only, nothing of llama.cpp in it.

The scheduler keeps the books of a context that it never sees: which sequences hold what, how many cells that takes, who
waits. Asked for a plan it says what to do, step by step, and then whose tokens to decode. It looks at no clock, so the
same requests in the same order give the same plans.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator

from llamastate.arrays import Int32Array
from llamastate.batch.cells import Cells
from llamastate.batch.jobs import (
    Action,
    Begin,
    Copy,
    Drop,
    Fork,
    Job,
    Kept,
    Load,
    Park,
    Phase,
    Row,
    Rules,
    Source,
    Unpark,
)
from llamastate.batch.radix import Colour, RadixTree
from llamastate.batch.rows import fixed_rows, mixed_rows, tiles_are_dear
from llamastate.batch.sources import best_source, can_give, n_roots, on_grid
from llamastate.batch.waiting import WaitingLine
from llamastate.sessioncore import common_prefix

__all__ = ["Scheduler"]


class Scheduler:
    """Who waits, who runs, and what is next.

    Parameters
    ----------
    rules : Rules
    lookup : callable, optional
        How many tokens of a job's prompt the store has.

    Notes
    -----
    *Fairness.* Requests that begin like one that runs go before older ones, and so do those of higher priority. Whoever
    has been overtaken by ``patience`` later ones is the next, and if there is no room for it yet, all wait until there
    is. So a request is admitted at the latest after those that came before it and ``patience`` others. One that has to
    give its place back before anything of it was computed, as there was no room after all, stands where it stood: those
    that were admitted in the meantime, fewer than there are slots, have overtaken it too, and nobody else will.
    What is parked goes before all that wait.
    """

    def __init__(self, rules: Rules, lookup: Callable[[Job], int] | None = None) -> None:
        self.rules = rules
        self.cells = Cells(rules.n_cells)
        self.tree = RadixTree()
        self.waiting = WaitingLine()
        #: Those that have a sequence, by key, in the order of their admission.
        self.running: dict[int, Job] = {}
        #: The oldest first.
        self.parked: list[Job] = []
        self.kept: dict[int, Kept] = {}
        #: What the last plan wants decoded.
        self.rows: list[Row] = []
        self.n_forks = 0
        self.n_preemptions = 0
        #: How much of a job's prompt the store has.
        self.lookup = lookup
        self._free_slots = list(range(rules.n_slots))
        self._free_spare = list(range(rules.n_slots, rules.n_slots + rules.n_spare))
        self._n_keys = 0
        self._n_admitted = 0
        self._tick = 0
        #: Batches of prompts alone since those that generate were last in one.
        self._put_off = 0

    # --- coming and going ---------------------------------------------------------------------------------------------

    def fits(self, n_prompt: int, limit: int) -> bool:
        """Whether a prompt, and the first token after it, can ever be held."""
        return n_prompt + (1 if limit > 1 else 0) <= self.rules.max_tokens

    def add(self, job: Job) -> None:
        """Let a job wait."""
        job.key = self._new_key()
        self.waiting.add(job)
        if job.share:
            self.tree.insert(job.key, job.tokens, Colour.WAITING)

    def chosen(self, job: Job) -> None:
        """A token was chosen for a job: its prompt is done, and one more token is to come or to be decoded."""
        job.prompt_done = True
        job.made += 1
        if job.phase is Phase.PROMPT:
            job.phase = Phase.GENERATE

    def decoded(self) -> None:
        """The rows of the last plan are in the context."""
        for job, start, end in self.rows:
            self.cells.grow(job, end - start)
        self.rows = []

    def loaded(self, job: Job, n: int) -> None:
        """The store had ``n`` tokens of it."""
        self.cells.grow(job, n)

    def finish(self, job: Job) -> list[Action]:
        """A job is done, or given up, in whatever phase; what is to be done with its sequence."""
        phase, job.phase = job.phase, Phase.DONE
        if phase is Phase.WAITING:
            self.waiting.leave(job)
            self._leave_tree(job)
            return []
        if phase is Phase.PARKED:
            self.parked.remove(job)
            return []
        if phase is Phase.DONE:
            return []
        actions: list[Action] = []
        keep = self._worth_keeping(job) if self.rules.fork_anywhere and job.share else 0
        if keep:
            wanted = self.tree.match(job.tokens, Colour.WAITING) >= keep or any(
                other.source is job for other in self.running.values()
            )
            if (kept := self._keep(job, keep, actions, wanted=wanted)) is not None:
                self._hand_over(job, kept)
        self._vacate(job)
        actions.append(Drop(job.seq))
        return actions

    def _new_key(self) -> int:
        self._n_keys += 1
        return self._n_keys

    def _leave_tree(self, job: Job) -> None:
        if job.share:
            self.tree.remove(job.key)

    def _vacate(self, job: Job) -> None:
        """Take a job out of its slot."""
        self._leave_tree(job)
        self.cells.release(job)
        del self.running[job.key]
        heapq.heappush(self._free_slots, job.seq)
        self._orphan(job)

    def _orphan(self, gone: Source) -> None:
        """Whoever waited for this source looks for another."""
        for job in self.running.values():
            if job.source is gone:
                job.source = None

    def _hand_over(self, old: Source, new: Source) -> None:
        for job in self.running.values():
            if job.source is old and job.fork_at <= new.held:
                job.source = new

    # --- the plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> Iterator[Action]:
        """What to do before the next decode, in this order; :attr:`rows` is complete when it ends.

        Every action counts as done as soon as the next one is asked for.
        """
        self._tick += 1
        yield from self._fork()
        yield from self._unpark()
        yield from self._admit()
        yield from self._fork()
        if self.rules.grid is None:
            yield from self._mixed_rows()
        else:
            self.rows = fixed_rows(self.running.values(), self.rules.grid)

    def kept_at(self, seq: int) -> Int32Array:
        """The tokens that a spare sequence keeps."""
        return next(kept.tokens for kept in self.kept.values() if kept.seq == seq)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self.parked)

    # --- who is next --------------------------------------------------------------------------------------------------

    def _admit(self) -> Iterator[Action]:
        if not (self._free_slots and self.waiting) or self.parked:
            return
        if any(job.gave_way and not job.held for job in self.running.values()):
            return  # it had to give its place back, and is not to again because of others
        if self._more_next():
            return
        promised = sum(self._promised(job) for job in self.running.values())
        while self._free_slots and self.waiting:
            job = self._choose()
            source, n = self._source(job)
            stored = self._stored(job, n)
            if stored:
                source, n = None, 0
            need = job.n_prompt - n + min(job.limit, self.rules.reserve)
            missing = need + promised - self.cells.free
            if missing > 0:
                yield from self._evict(missing, source, anyone=not self.running)
                missing = need + promised - self.cells.free
            if missing > 0 and self.running:
                return
            if source is not None and isinstance(source, Kept) and source.key not in self.kept:
                continue  # it had to go to make room
            self._place(job, source, n)
            if stored:
                yield Load(job, stored)
            promised += self._promised(job)

    def _more_next(self) -> bool:
        """Whether the next step certainly frees more places than are free: all are taken together then.

        Prompts cost less together, while cells are few, than one by one beside steps of others. But not if that would
        end all who have what others are going to begin with.
        """
        if self.rules.grid is not None or self._put_off:
            return False
        running = self.running.values()
        ending = [job for job in running if job.phase is Phase.GENERATE and job.limit - job.made == 1]
        if len(ending) <= len(self._free_slots):
            return False
        if not self.rules.fork_anywhere:
            return True
        # what they begin with is to outlive them
        matches = [(job.tokens, self.tree.match(job.tokens, Colour.WAITING)) for job in ending if job.share]
        wanted = [tokens[:n] for tokens, n in matches if n >= self.rules.min_share]
        gone = set(map(id, ending))
        held = [k.tokens for k in self.kept.values()] + [j.tokens for j in running if j.share and id(j) not in gone]
        room = len(self._free_spare) + sum(not self._wanted(kept) for kept in self.kept.values())
        return n_roots(wanted, held, self.rules.min_share) <= room

    def _promised(self, job: Job) -> int:
        """Cells that a job was told it would find."""
        return min(job.to_come, self.rules.reserve + job.prompt_to_come)

    def _choose(self) -> Job:
        """The next one to admit."""
        head = self.waiting.first
        if self.waiting.overtaken >= self.rules.patience:
            return head
        if len(priorities := self.waiting.priorities) > 1:
            top = max(priorities)
            among = [job for job in self.waiting if job.priority == top]
            return max(among, key=lambda job: (self.tree.match(job.tokens, Colour.RESIDENT), -job.key))
        n, keys = self.tree.best_common()
        if n < self.rules.min_share:
            return head
        return self.waiting[min(keys)]  # type: ignore[type-var, index]  # all keys are ints

    def _place(self, job: Job, source: Source | None, n: int) -> None:
        self.waiting.leave(job)
        if job.share:
            self.tree.recolour(job.key, Colour.RESIDENT)
        job.seq = heapq.heappop(self._free_slots)
        self._n_admitted += 1
        job.admitted = self._n_admitted
        job.phase = Phase.PLACED
        self.running[job.key] = job
        self._aim(job, source, n)

    def _aim(self, job: Job, source: Source | None, n: int) -> None:
        """Let a job begin with the first ``n`` tokens of another sequence, as soon as that has them."""
        job.source, job.fork_at = source, n
        if source is not None:
            job.shared_at = max(job.shared_at, n)
            if isinstance(source, Job):
                source.shared_at = max(source.shared_at, n)
                if not self.rules.fork_anywhere and n not in source.stops:
                    insort(source.stops, n)
            else:
                source.used = self._tick
        if job.share and not self.rules.fork_anywhere:
            for stop in self.tree.branches(job.tokens, Colour.WAITING):
                stop = on_grid(min(stop, job.n_prompt), self.rules.grid)
                if stop not in job.stops and self._worth_stopping(job, stop, n):
                    insort(job.stops, stop)

    def _worth_stopping(self, job: Job, stop: int, n: int) -> bool:
        """Whether a state at ``stop`` spares those who wait enough, if they have ``n`` tokens without it."""
        if stop < self.rules.min_share or stop <= n:
            return False
        among = sum(other.share and common_prefix(other.tokens, job.tokens) >= stop for other in self.waiting)
        return (stop - n) * among >= self.rules.min_share

    def _source(self, job: Job) -> tuple[Source | None, int]:
        """The sequence to take a job's beginning from, and how much of it."""
        if not job.share or self._matched(job) < self.rules.min_share:
            return None, 0
        return best_source(job, [*self.kept.values(), *self.running.values()], self.rules)

    def _matched(self, job: Job) -> int:
        """How much of a job's prompt is resident, itself left out."""
        if job.key not in self.running:
            return self.tree.match(job.tokens, Colour.RESIDENT)
        self.tree.recolour(job.key, Colour.WAITING)
        n = self.tree.match(job.tokens, Colour.RESIDENT)
        self.tree.recolour(job.key, Colour.RESIDENT)
        return n

    def _stored(self, job: Job, n: int) -> int:
        """How much to take from the store: nothing, unless it has clearly more than is at hand."""
        if self.lookup is None or not job.share or job.n_prompt - 1 <= n:
            return 0
        stored = on_grid(min(self.lookup(job), job.n_prompt - 1), self.rules.grid)
        return stored if stored >= max(n + n // 8, n + self.rules.min_share, 1) else 0

    # --- forking ------------------------------------------------------------------------------------------------------

    def _fork(self) -> Iterator[Action]:
        for job in list(self.running.values()):
            if job.phase is not Phase.PLACED:
                continue
            if not job.held and (job.source is None or not can_give(job.source, job.fork_at, self.rules)):
                self._aim(job, *self._source(job))
            source, n = job.source, job.fork_at
            if source is None:
                job.phase = Phase.PROMPT
                continue
            whole = n == job.n_prompt
            if source.held >= n and not (whole and not (job.twin_of is not None and job.twin_of.prompt_done)):
                yield Fork(job, source.seq, n)
                if job.key not in self.running:  # it could not be done
                    continue
                self.n_forks += 1
                self.cells.fork(source, job, n)
                job.source = None
                job.phase = Phase.GENERATE if whole else Phase.PROMPT
                if whole:
                    yield Begin(job)
        if not self.rules.fork_anywhere:
            yield from self._leave_behind()

    def _leave_behind(self) -> Iterator[Action]:
        """Keep what waiting requests will want of sequences that are about to go on."""
        for job in list(self.running.values()):
            if not job.stops or job.stops[0] > job.held or job.phase not in (Phase.PROMPT, Phase.GENERATE):
                continue
            n = job.stops[0]
            if n == job.n_prompt and not job.prompt_done:
                continue
            job.stops = job.stops[bisect_right(job.stops, job.held) :]
            if n != job.held or any(k.held == n == common_prefix(k.tokens, job.tokens) for k in self.kept.values()):
                continue
            wanted = any(on_grid(b, self.rules.grid) == n for b in self.tree.branches(job.tokens, Colour.WAITING))
            if wanted or n < job.n_prompt:
                actions: list[Action] = []
                self._keep(job, n, actions, wanted=wanted)
                yield from actions

    def _worth_keeping(self, job: Job) -> int:
        """How many tokens of a job that ends somebody else may want to begin with."""
        n = max(self.tree.match(job.tokens, Colour.WAITING), job.shared_at)
        n = min(n, job.held, job.n_prompt)
        for parked in self.parked:
            n = max(n, min(common_prefix(parked.tokens, job.tokens), job.held))
        if n < self.rules.min_share:
            return 0
        holders: list[Source] = [*self.kept.values(), *self.running.values()]
        for holder in holders:
            if holder is not job and min(holder.held, common_prefix(holder.tokens, job.tokens)) >= n:
                return 0
        return n

    def _keep(self, source: Job, n: int, actions: list[Action], *, wanted: bool) -> Kept | None:
        """Put the first ``n`` tokens of a sequence aside; ``wanted`` if somebody waits for them."""
        if not self._free_spare:
            least = self._least_wanted(None)
            if least is None or (self._wanted(least) and not wanted):
                return None
            actions.append(self._let_go(least))
        kept = Kept(self._new_key(), heapq.heappop(self._free_spare), source.tokens[:n], self._tick)
        self.cells.fork(source, kept, n)
        self.kept[kept.key] = kept
        self.tree.insert(kept.key, kept.tokens, Colour.RESIDENT)
        actions.append(Copy(source.seq, kept.seq, n))
        return kept

    # --- room ---------------------------------------------------------------------------------------------------------

    def _wanted(self, kept: Kept) -> bool:
        """Whether somebody waits for this prefix."""
        n = kept.held
        return self.tree.match(kept.tokens, Colour.WAITING) == n or any(
            common_prefix(job.tokens, kept.tokens) == n for job in self.parked
        )

    def _least_wanted(self, but: Source | None) -> Kept | None:
        """The kept prefix that can go: one nobody waits for, the one not used for the longest time."""
        in_use = {id(job.source) for job in self.running.values() if job.source is not None}
        found = [k for k in self.kept.values() if k is not but and id(k) not in in_use]
        return min(found, key=lambda k: (self._wanted(k), k.used), default=None)

    def _let_go(self, kept: Kept) -> Drop:
        del self.kept[kept.key]
        self.tree.remove(kept.key)
        self.cells.release(kept)
        self._orphan(kept)
        heapq.heappush(self._free_spare, kept.seq)
        return Drop(kept.seq)

    def _evict(self, n_cells: int, but: Source | None = None, *, anyone: bool = False) -> Iterator[Action]:
        """Free cells of kept prefixes; of those that somebody waits for only if ``anyone`` will do."""
        enough = self.cells.free + n_cells
        while self.cells.free < enough:
            least = self._least_wanted(but)
            if least is None and anyone and isinstance(but, Kept) and but.key in self.kept:
                least = but
            if least is None or (self._wanted(least) and not anyone):
                return
            yield self._let_go(least)

    def _unpark(self) -> Iterator[Action]:
        while self.parked and self._free_slots:
            job = self.parked[0]
            ahead = min(job.to_come, self.rules.reserve) + len(self.running)
            missing = job.preserved + ahead - self.cells.free
            if missing > 0:
                yield from self._evict(missing, anyone=not self.running)
                missing = job.preserved + ahead - self.cells.free
            if missing > 0 and self.running:
                return
            self.parked.pop(0)
            job.seq = heapq.heappop(self._free_slots)
            if job.share:
                self.tree.insert(job.key, job.tokens, Colour.RESIDENT)
            self.running[job.key] = job
            self.cells.grow(job, job.preserved)
            job.phase = Phase.GENERATE if job.prompt_done else Phase.PROMPT
            yield Unpark(job)
            if job.key not in self.running:
                return  # there was no room after all

    def park_youngest(self) -> Iterator[Action]:
        """Make room at the expense of whoever was admitted last; nothing if there is only one."""
        if len(self.running) < 2:
            return
        job = max(self.running.values(), key=lambda j: j.admitted)
        if not job.held:  # nothing to save: as if it had never been admitted
            self._vacate(job)
            job.phase = Phase.WAITING
            job.source = None
            job.stops = []
            job.gave_way = True
            self.waiting.put_back(job)
            if job.share:
                self.tree.insert(job.key, job.tokens, Colour.WAITING)
            return
        yield Park(job, job.seq)
        if job.key not in self.running:
            return
        job.preemptions += 1
        self.n_preemptions += 1
        self.park(job)

    def park(self, job: Job) -> None:
        """A job's state is out of the context, or did not come back into it."""
        job.preserved = job.held
        self._vacate(job)
        job.phase = Phase.PARKED
        job.stops = []
        insort(self.parked, job, key=lambda j: j.admitted)

    def make_room(self) -> Iterator[Action]:
        """The context had no room where the books saw some: let go whatever can go first; nothing if nothing can."""
        least = self._least_wanted(None)
        if least is not None and (not self._wanted(least) or len(self.running) < 2):
            yield self._let_go(least)
        else:
            yield from self.park_youngest()

    # --- the batch ----------------------------------------------------------------------------------------------------

    def _mixed_rows(self) -> Iterator[Action]:
        """One token of all that generate, and as much of prompts as fits."""
        while True:
            steps = [job for job in self.running.values() if job.phase is Phase.GENERATE]
            prompts = [job for job in self.running.values() if job.phase is Phase.PROMPT]
            wanted = min(self.rules.budget, len(steps) + sum(j.n_prompt - j.held for j in prompts))
            if wanted > self.cells.free:
                yield from self._evict(wanted - self.cells.free)
            room = self.cells.free
            if room < max(1, len(steps)) and (steps or prompts):
                if len(self.running) > 1:
                    yield from self.park_youngest()
                    continue
                yield from self._evict(wanted - room, anyone=True)
                room = self.cells.free
            break
        room = min(self.rules.budget, room)
        if self.rules.tiled and tiles_are_dear(steps, prompts, room, self.cells.used):
            # Prompts first: the more are through, the more one step does, whose cells are left to it. But prompts whose
            # first token is their last make room for others without end.
            self.rows = mixed_rows((), prompts, room - len(steps)) if self._put_off < self.rules.n_slots else []
            if self.rows:
                self._put_off += 1
                return
        self._put_off = 0
        self.rows = mixed_rows(steps, prompts, room)
