"""Carries the scheduler's plans out on a context: decodes, samples, forks, parks."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from llamastate.arrays import Int32Array
from llamastate.batch.embedder import Embedder
from llamastate.batch.jobs import Action, Begin, Copy, Drop, Fork, Job, Load, Park, Phase, Row, Rules
from llamastate.batch.parking import Parking
from llamastate.batch.request import FinishReason, Request, Result
from llamastate.batch.scheduler import Scheduler
from llamastate.batch.tasks import Pieces, Task, Ticket, token_logprob
from llamastate.errors import (
    ClosedError,
    DecodeError,
    FingerprintUnavailableError,
    InvalidArgumentError,
    LlamaStateError,
    NoKVSlotError,
    NotEnoughCellsError,
    SamplerError,
    UnsupportedLayoutError,
)

if TYPE_CHECKING:
    from llamastate.context import Context
    from llamastate.prefix import PrefixStore

__all__ = ["Counts", "Engine"]

#: Errors of a store that come again whenever it is asked.
_FOR_GOOD = (ClosedError, FingerprintUnavailableError, UnsupportedLayoutError)


class Counts:
    """What an engine has done. Seconds are of the clock on the wall."""

    def __init__(self) -> None:
        self.done = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.stored_tokens = 0
        self.generated_tokens = 0
        self.decodes = 0
        self.decoded_tokens = 0
        self.decode_seconds = 0.0
        self.sample_seconds = 0.0
        self.schedule_seconds = 0.0
        self.prepare_seconds = 0.0
        self.store_seconds = 0.0


class Engine:
    """Requests in, results out, a decode at a time.

    Parameters
    ----------
    ctx : Context
        Empty, with ``rules.n_slots + rules.n_spare`` sequences and one more, which stays empty.
    rules : Rules
    parking : Parking
    store : PrefixStore, optional
    """

    def __init__(self, ctx: Context, rules: Rules, parking: Parking, store: PrefixStore | None = None) -> None:
        self.ctx = ctx
        self.model = ctx.model
        self.rules = rules
        self.counts = Counts()
        self.tickets: dict[int, Ticket] = {}
        self.scheduler = Scheduler(rules, None if store is None else self._lookup)
        self.pieces = Pieces(ctx.model)
        #: Made when the first request asks for it.
        self.embedder: Embedder | None = None
        self._parking = parking
        self._store = store
        self._n_puts = 0
        self._store_told = False
        #: A step has begun and not ended.
        self._broken = False
        self._results: list[tuple[Ticket, Result]] = []
        n = max(rules.budget, rules.n_slots)
        # columns of a batch
        self._tokens, self._pos, self._seqs = (np.zeros(n, np.int32) for _ in range(3))
        self._ones = np.ones(n, np.int32)
        self._outputs = np.zeros(n, np.int8)

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, since: float) -> Ticket:
        """Let a request wait.

        Raises
        ------
        LlamaStateError
            Something is wrong with it, or it can never fit.
        """
        ticket = Ticket(request, self.model, self.pieces, since)
        if request.kind == "embed":
            if self.embedder is None:
                self.embedder = Embedder(self.model, self.ctx.n_threads)
            self.embedder.add(ticket)
            return ticket
        n = len(ticket.tokens)
        if not self.scheduler.fits(n, request.max_tokens):
            limit = self.rules.max_tokens
            raise InvalidArgumentError(
                f"a prompt of {n} tokens does not fit {limit} cells" + (" with a token after it" if n <= limit else ""),
                name="prompt",
                value=n,
                limit=limit,
            )
        for task in ticket.tasks:
            self.scheduler.add(task)
        self.tickets[id(ticket)] = ticket
        return ticket

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle and not self._n_embeds

    @property
    def n_waiting(self) -> int:
        """Requests, and twins of theirs, that have not begun."""
        return len(self.scheduler.waiting) + self._n_embeds

    @property
    def _n_embeds(self) -> int:
        return 0 if self.embedder is None else len(self.embedder.queue)

    def abandon(self) -> list[Ticket]:
        """Give up everything that is not done; what that was, in the order in which it came."""
        # whoever was interrupted between the two may be in both
        left = list({id(t): t for t in [*(t for t, _ in self._results), *self.tickets.values()]}.values())
        self._results = []
        for ticket in list(self.tickets.values()):
            if self._broken:
                for task in ticket.tasks:
                    self._parking.drop(task)
                    task.end()
            else:
                self._clear(ticket)
        if self._broken:
            # Ctrl-C, or no memory, in the middle of a step: who knows what the books say
            self.tickets.clear()
            self.ctx.clear(data=False)
            old = self.scheduler
            self.scheduler = Scheduler(self.rules, old.lookup)
            self.scheduler.n_forks, self.scheduler.n_preemptions = old.n_forks, old.n_preemptions
            self._broken = False
        return left if self.embedder is None else left + self.embedder.clear()

    def close(self) -> None:
        """Free the contexts. Idempotent."""
        self.ctx.close()
        if self.embedder is not None:
            self.embedder.close()

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Ticket, Result]]:
        """Plan, decode, sample; the results that have come of it."""
        self._broken = True
        if self._n_embeds:
            self._embed()
        if not self.scheduler.idle:
            self._generate()
        self._broken = False
        results, self._results = self._results, []
        return results

    def _embed(self) -> None:
        assert self.embedder is not None
        for ticket, found in self.embedder.step():
            self._start(ticket)
            if isinstance(found, LlamaStateError):
                self.counts.failed += 1
                self._results.append((ticket, ticket.result(error=found)))
            else:
                self.counts.done += 1
                self.counts.prompt_tokens += len(ticket.tokens)
                self._results.append((ticket, ticket.result(embedding=found)))

    def _generate(self) -> None:
        counts = self.counts
        started = time.perf_counter()
        before = counts.store_seconds + counts.sample_seconds
        for action in self.scheduler.plan():
            self._carry_out(action)
        rows = self.scheduler.rows
        spent = counts.store_seconds + counts.sample_seconds - before
        if rows:
            ends = self._fill(rows)
            ready = time.perf_counter()
            counts.schedule_seconds += ready - started - spent
            if self._decode(rows, ends[-1]):
                decoded = time.perf_counter()
                counts.decode_seconds += decoded - ready
                self.scheduler.decoded()
                before = counts.store_seconds
                for (job, start, end), at in zip(rows, ends, strict=True):
                    if job.phase is not Phase.DONE:
                        self._after(job, start, end, at)  # type: ignore[arg-type]  # the engine adds only tasks
                counts.sample_seconds += time.perf_counter() - decoded - (counts.store_seconds - before)
        else:
            counts.schedule_seconds += time.perf_counter() - started - spent

    def _fill(self, rows: list[Row]) -> list[int]:
        """Write a batch of these rows; for each of them where it ends."""
        tokens, pos, seqs, outputs = self._tokens, self._pos, self._seqs, self._outputs
        if self.rules.grid is not None and rows[0].job.phase is Phase.GENERATE:
            return self._fill_all(rows)
        at = 0
        ends = []
        for job, start, end in rows:
            n = end - start
            if start < job.n_prompt:
                tokens[at : at + n] = job.tokens[start:end]
                pos[at : at + n] = np.arange(start, end)
                seqs[at : at + n] = job.seq
                outputs[at : at + n] = not job.share
                at += n
                outputs[at - 1] = not job.share or (end == job.n_prompt and job.limit > 0)
            else:
                tokens[at] = job.chosen[-1]  # type: ignore[attr-defined]  # the engine adds only tasks
                pos[at] = start
                seqs[at] = job.seq
                outputs[at] = 1
                at += 1
            ends.append(at)
        return ends

    def _fill_all(self, rows: list[Row]) -> list[int]:
        """One token of every slot, in their order, whether anybody is there or not."""
        n = self.rules.n_slots
        self._tokens[:n] = 0
        self._pos[:n] = 0
        self._seqs[:n] = np.arange(n)
        self._outputs[:n] = 1
        for job, start, _ in rows:
            self._tokens[job.seq] = job.chosen[-1]  # type: ignore[attr-defined]
            self._pos[job.seq] = start
        return [row.job.seq + 1 for row in rows]

    def _decode(self, rows: list[Row], n: int) -> bool:
        """Decode the batch; whether that was done."""
        everybody = self.rules.grid is not None and rows[0].job.phase is Phase.GENERATE
        if everybody:
            n = self.rules.n_slots
        try:
            self.ctx._decode(self._tokens[:n], self._pos[:n], self._ones[:n], self._seqs[:n], self._outputs[:n])
        except NoKVSlotError as error:
            self._make_room(rows, error)
            return False
        except DecodeError as error:
            for ticket in {id(t): t for t in (row.job.ticket for row in rows)}.values():  # type: ignore[attr-defined]
                self._fail(ticket, error)
            return False
        finally:
            if everybody:
                taken = {row.job.seq for row in rows}
                for seq in range(n):
                    if seq not in taken:
                        self.ctx.seq_rm(seq)
        self.counts.decodes += 1
        self.counts.decoded_tokens += n
        return True

    def _make_room(self, rows: list[Row], error: NoKVSlotError) -> None:
        """Window cells are not in the books: somebody has to go, or the only one is as long as it can be."""
        running = len(self.scheduler.running)
        done = False
        for action in self.scheduler.make_room():
            self._carry_out(action)
            done = True
        if done or len(self.scheduler.running) < running:
            return
        task: Any = rows[0].job
        if task.chosen:
            self._finish(task, "full")
        else:
            self._fail(task.ticket, error)

    # --- what a plan says ---------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        ctx = self.ctx
        try:
            if isinstance(action, Fork):
                task = self._task(action.job)
                self._start(task.ticket)
                ctx.seq_cp(action.seq, task.seq, 0, action.n)
                self._note_cached(task, action.n)
            elif isinstance(action, Drop):
                ctx.seq_rm(action.seq)
            elif isinstance(action, Copy):
                ctx.seq_cp(action.seq, action.dest, 0, action.n)
                if not self.rules.fork_anywhere:
                    self._put(action.dest, self.scheduler.kept_at(action.dest))
            elif isinstance(action, Begin):
                task = self._task(action.job)
                assert task.ticket.logits is not None
                self._choose(task, task.ticket.logits)
            elif isinstance(action, Load):
                task = self._task(action.job)
                self._start(task.ticket)
                self._load(task, action.n)
            elif isinstance(action, Park):
                self._parking.put(ctx, self._task(action.job))
                ctx.seq_rm(action.seq)
            else:
                self._unpark(self._task(action.job))
        except LlamaStateError as error:
            job = getattr(action, "job", None)
            if job is None:
                raise
            self._fail(self._task(job).ticket, error)

    def _task(self, job: Job) -> Task:
        assert isinstance(job, Task)
        return job

    def _start(self, ticket: Ticket) -> None:
        if ticket.queued is None:
            ticket.queued = time.perf_counter() - ticket.since

    def _note_cached(self, task: Task, n: int) -> None:
        if not task.index:
            task.ticket.n_cached = n

    def _unpark(self, task: Task) -> None:
        try:
            self._parking.get(self.ctx, task)
        except (LlamaStateError, MemoryError):
            self.ctx.seq_rm(task.seq)
            if len(self.scheduler.running) < 2:
                raise
            self.scheduler.park(task)

    # --- the store ----------------------------------------------------------------------------------------------------

    def _lookup(self, job: Job) -> int:
        task = self._task(job)
        if self._store is None:
            return 0
        if task.stored[0] != self._n_puts:
            started = time.perf_counter()
            task.stored = self._n_puts, 0  # one that fails is not asked again for the same
            try:
                task.stored = self._n_puts, self._store.lookup(task.tokens, ctx=self.ctx)
            except Exception as error:
                self._store_failed(error)
            self.counts.store_seconds += time.perf_counter() - started
        return task.stored[1]

    def _load(self, task: Task, n: int) -> None:
        started = time.perf_counter()
        try:
            n = 0 if self._store is None else self._store.load(self.ctx, task.seq, task.tokens, max_tokens=n)
        except Exception as error:
            self._store_failed(error)
            self.ctx.seq_rm(task.seq)
            n = 0
        self.counts.store_seconds += time.perf_counter() - started
        self.counts.stored_tokens += n
        self.scheduler.loaded(task, n)
        self._note_cached(task, n)

    def _put(self, seq: int, tokens: Int32Array) -> None:
        """Store what a sequence holds, which is these tokens."""
        if self._store is None:
            return
        started = time.perf_counter()
        try:
            if self._store.put(self.ctx, seq, tokens):
                self._n_puts += 1
        except Exception as error:
            self._store_failed(error)
        self.counts.store_seconds += time.perf_counter() - started

    def _store_failed(self, error: Exception) -> None:
        """A store that fails is no reason to stop, whatever it raises; and to give it up only if it can never work."""
        error.__traceback__ = None
        if isinstance(error, (NotEnoughCellsError, NoKVSlotError)):
            return  # that is the cache's lack of room, not the store's
        if isinstance(error, _FOR_GOOD):
            self._store = None
            self.scheduler.lookup = None
            warnings.warn(f"the batch goes on without its prefix store: {error}", RuntimeWarning, stacklevel=2)
        elif not self._store_told:
            self._store_told = True
            what = str(error) or type(error).__name__
            warnings.warn(f"the prefix store failed; it will be asked again: {what}", RuntimeWarning, stacklevel=2)

    # --- what comes of a decode ---------------------------------------------------------------------------------------

    def _after(self, task: Task, start: int, end: int, at: int) -> None:
        """A row of the batch, which ended before ``at``, is in the context."""
        ticket = task.ticket
        if start < task.n_prompt:
            self._start(task.ticket)
            if not task.share:
                self._score_prompt(task, start, end, at)
            if end < task.n_prompt:
                return
            if not task.index:
                self._put(task.seq, task.tokens)
            if not task.limit:
                task.prompt_done = True
                self._finish(task, "length")
                return
            if len(ticket.tasks) > 1 and ticket.logits is None:
                ticket.logits = self.ctx.logits(at - 1)
        try:
            row = self.ctx.logits(at - 1, copy=False)
            self._choose(task, row)
        except LlamaStateError as error:
            self._fail(ticket, error)

    def _choose(self, task: Task, row: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Take the next token, and see whether it is the last."""
        ticket = task.ticket
        request = ticket.request
        if not task.prompt_done:
            task.begin(self.model, self.pieces)
            if ticket.first is None:
                ticket.first = time.perf_counter() - ticket.since
        if task.sampler is None:
            token = int(row.argmax())
            if row[token] != row[token]:  # argmax finds what is no number first
                raise SamplerError("logits are not numbers", reason="nan logits")
        else:
            token = task.sampler.sample_logits(row)
        self.scheduler.chosen(task)
        piece, ends = self.pieces(token)
        if ends:
            self._finish(task, "stop")
            return
        task.chosen.append(token)
        if task.logprobs is not None:
            task.logprobs.append(token_logprob(row, token, request.logprobs or 0, self.pieces))
        stream = task.stream
        if stream is not None and piece:
            if text := stream.push(piece):
                task.text.append(text)
            if stream.stopped is not None:
                self._finish(task, "stop")
                return
        if task.made >= task.limit:
            self._finish(task, "length")
        elif task.held >= self.rules.max_tokens:
            self._finish(task, "full")

    def _score_prompt(self, task: Task, start: int, end: int, at: int) -> None:
        """Note how likely the prompt's own tokens were."""
        scores = task.ticket.prompt_logprobs
        if scores is None or task.index:
            return
        first = at - (end - start)
        for i in range(start, min(end, task.n_prompt - 1)):
            row = self.ctx.logits(first + i - start, copy=False)
            n_top = task.ticket.request.logprobs or 0
            scores.append(token_logprob(row, int(task.tokens[i + 1]), n_top, self.pieces))

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, task: Task, reason: FinishReason) -> None:
        self._let_go(task)
        self.counts.generated_tokens += len(task.chosen)
        if task.ticket.put(task, reason):
            ticket = task.ticket
            self._results.append((ticket, ticket.result()))
            del self.tickets[id(ticket)]
            self.counts.done += 1
            self.counts.prompt_tokens += len(ticket.tokens)
            self.counts.cached_tokens += ticket.n_cached

    def _fail(self, ticket: Ticket, error: LlamaStateError) -> None:
        if id(ticket) not in self.tickets:
            return
        error.__traceback__ = None  # its frames hold views of logits
        self._results.append((ticket, ticket.result(error=error)))
        self._clear(ticket)
        self.counts.failed += 1

    def _clear(self, ticket: Ticket) -> None:
        del self.tickets[id(ticket)]
        for task in ticket.tasks:
            self._let_go(task)

    def _let_go(self, task: Task) -> None:
        for action in self.scheduler.finish(task):
            self._carry_out(action)
        self._parking.drop(task)
        task.end()
