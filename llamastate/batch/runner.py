"""The batch runner: requests in, results out, as many at once as the context holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from llamastate.arrays import as_index
from llamastate.batch.choices import is_tiled, n_ctx_for, n_parallel_for
from llamastate.batch.engine import Counts, Engine
from llamastate.batch.jobs import Rules
from llamastate.batch.parking import Parking
from llamastate.batch.reading import END, NOTHING, Pulled, Reader, iterator_of, settled
from llamastate.batch.request import Malformed, Request, Result, Times
from llamastate.batch.stats import BatchStats
from llamastate.context import Context
from llamastate.errors import (
    ClosedError,
    ContextBusyError,
    ContextCreateError,
    InvalidArgumentError,
    LlamaStateError,
)
from llamastate.lifetimes import Closing
from llamastate.model import Model

if TYPE_CHECKING:
    from llamastate.prefix import PrefixStore

__all__ = ["BatchRunner"]


class BatchRunner(Closing):
    """Many requests through one model: decoded together, what they share computed once.

    Parameters
    ----------
    model : Model or path-like
        Of a path the model is loaded here, with no more said of it, and closed with the runner.
    n_parallel : int, optional
        Outputs generated at once, in [1, 200]; by default 16 on a processor, where more gain nothing, and 32 if layers
        are on a GPU.
    n_ctx : int
        Cells of the cache, for everything that is held at once. By default 512 for each of ``n_parallel`` outputs (of
        32 if that is not given), or
        as many as the model was trained on (8,192 at most) if that is more: the same wherever it runs. With
        ``fixed_shapes`` 1,024 for each sequence.
    store : PrefixStore, optional
        Where prompts' prefixes are looked up, and put. It stays open when the runner is closed.
    n_batch : int
        Tokens of one decode. 512 is what a decode computes at once, and all that is to be gained.
    n_ubatch : int, optional
        Tokens computed at once; as many as ``n_batch``.
    n_threads : int, optional
        All cores by default.
    type_k, type_v, flash_attn
        As for :class:`~llamastate.Context`. See the notes for ``flash_attn`` on processors.
    max_model_len : int, optional
        The most tokens that one request may have, with what it generates; by default those that the model was trained
        on. The cache holds no more than ``n_ctx`` in any case.
    n_spare : int
        Sequences that keep prefixes which nobody runs at the moment.
    window : int, optional
        Requests that are read ahead: among them those that begin alike are found. Four times ``n_parallel`` by
        default. Nothing else is read before there is room.
    patience : int, optional
        A request is overtaken by so many later ones at most; as many as ``window`` by default.
    reserve : int
        Cells that a request needs free beyond its prompt to be admitted, if it may generate as many. What is generated
        beyond that may park others.
    preempt_bytes : int
        What states of parked requests may take in memory; more go to temporary files. A state that is lost there is
        decoded again.
    spill_folder : path-like, optional
        Where those files are, without a name; the system's temporary folder by default.
    fixed_shapes : bool
        The same outputs, bit for bit, whatever else runs. See the notes.

    Raises
    ------
    ContextCreateError
        There is no memory for so many cells, say.
    ModelLoadError, InvalidArgumentError

    Notes
    -----
    *Order and fairness.* Requests that begin like something in the context go first, then by age; those of higher
    priority before all others. A request is overtaken by ``patience`` later ones at most, and by fewer than
    ``n_parallel`` more if it was admitted and had to give way before anything of it was computed.

    *Memory.* A request is admitted when its prompt and ``reserve`` tokens more have room. If the cache runs full all
    the same, the request admitted last is parked: its state goes to memory, or to a file, and comes back as it was.

    *Flash attention on processors.* With it a step of fewer than 64 sequences reads each one's cells alone, once for
    every sequence: the cost goes with what each holds. Without, one multiplication takes all rows by all cells in use:
    cheap where most of them are shared, dear where nothing is. So ``"off"`` is the faster where requests begin with the
    same long text, and the slower by as much where they do not (:func:`~llamastate.batch.flash_attn_for` looks at
    requests); a quantised V cache is not to be had with it, and the states of sequences that ran side by side (the
    store, parking) take longer to copy. ``"auto"`` is on where llama.cpp can.

    *Reproducible.* The plan depends on the requests and their order, not on time: the same requests give the same
    batches, and so the same outputs, from run to run (unless they come so slowly that others are run in the meantime).
    In other company the batches have other shapes, and the last bits
    of logits change with them. With ``fixed_shapes`` they do not: each sequence has its own part of the cache
    (``n_ctx / (n_parallel + n_spare + 1)`` cells), a chunk of a prompt ends at a multiple of 128 tokens and is decoded
    alone, and a step of generation is a batch of ``n_parallel`` rows, whoever is there; shared prefixes are copied, in
    whole chunks. That costs throughput, and the more so the fewer requests run.

    Examples
    --------
    >>> with BatchRunner(model) as runner:  # doctest: +SKIP
    ...     for result in runner.run(Request(str(i), text) for i, text in enumerate(texts)):
    ...         print(result.id, result.outputs[0].text)
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        *,
        n_parallel: int | None = None,
        n_ctx: int = 0,
        store: PrefixStore | None = None,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: str = "auto",
        max_model_len: int | None = None,
        n_spare: int = 8,
        window: int | None = None,
        patience: int | None = None,
        reserve: int = 256,
        preempt_bytes: int = 1 << 30,
        spill_folder: str | os.PathLike[str] | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        if n_parallel is not None:
            n_parallel = _within("n_parallel", n_parallel, 1, 200)
        n_spare = _within("n_spare", n_spare, 0, 255 - (n_parallel or 32))
        n_batch = _within("n_batch", n_batch, 1, 1 << 20)
        window = None if window is None else _within("window", window, 1, 1 << 30)
        patience = None if patience is None else _within("patience", patience, 0, 1 << 30)
        n_ctx = _within("n_ctx", n_ctx, 0, (1 << 31) - 257)
        longest = None if max_model_len is None else _within("max_model_len", max_model_len, 1, 1 << 30)
        reserve = _within("reserve", reserve, 1, 1 << 30)
        self._parking = Parking(_within("preempt_bytes", preempt_bytes, 0, 1 << 62), spill_folder)
        self._loaded = Model(model) if isinstance(model, (str, os.PathLike)) else None
        given: Any = self._loaded or model
        if not isinstance(given, Model):
            what = type(given).__name__
            raise InvalidArgumentError(f"model is {what}: a Model, or the path of one", name="model", value=given)
        self.model = model = given
        n_asked, n_parallel = n_parallel, n_parallel or n_parallel_for(model)
        n_seq = n_parallel + n_spare + 1
        n_batch = max(n_batch, n_seq)
        self._window = window or 4 * n_parallel
        params: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_threads": n_threads}
        params.update(n_seq_max=n_seq, n_batch=n_batch, n_ubatch=n_ubatch or n_batch, kv_unified=not fixed_shapes)
        default = n_ctx_for(model, 2 * n_seq if fixed_shapes else n_asked)
        try:
            self.ctx = Context(model, n_ctx=n_ctx or default, **params)
        except BaseException as error:
            if self._loaded is not None:
                self._loaded.close()
            if isinstance(error, ContextCreateError) and error.reason == "memory" and not n_ctx:
                message = f"{error.message}; n_ctx is {default} if it is not given"
                raise ContextCreateError(message, params=error.params, reason=error.reason) from None
            raise
        kind = model.memory_kind
        bounded = kind != "recurrent"
        most = min(self.ctx.n_ctx_seq if bounded else 1 << 30, longest or model.n_ctx_train or 1 << 30)
        rules = Rules(
            n_slots=n_parallel,
            n_spare=n_spare,
            n_cells=self.ctx.n_ctx if bounded and not fixed_shapes else None,
            max_tokens=most,
            budget=self.ctx.n_batch,  # llama.cpp takes no more than there are cells
            fork_anywhere=kind == "attention",
            min_share=8 if kind == "attention" else 32,
            reserve=reserve,
            patience=self._window if patience is None else patience,
            grid=min(128, self.ctx.n_batch) if fixed_shapes else None,
            tiled=is_tiled(model, flash_attn, type_k, type_v),
        )
        self._engine = Engine(self.ctx, rules, self._parking, store)
        self._turn = threading.Lock()
        #: A plain word: a signal handler may set it at any moment, and a lock could be held then.
        self._stopping = False
        self._unfinished: list[Request] = []
        #: The iterator of the run under way, what it reads, and the thread that was in it last.
        self._active: Callable[[], Any] = lambda: None
        self._reader: Reader | None = None
        self._thread = 0
        #: Whose result was handed back last.
        self._handed: Request | Malformed | None = None
        self._closed = False

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[Request | Malformed | Future[Any]]) -> Iterator[Result]:
        """Process requests.

        Parameters
        ----------
        requests : iterable of Request or Malformed
            Read as there is room for them, so it may be without end; and it may keep the runner waiting: what is there
            is run in the meantime. See the notes.

        Yields
        ------
        Result
            As they are done, in any order; each request has exactly one. What is wrong with a request is told by its
            :attr:`Result.error`, and no other request suffers.

        Raises
        ------
        ContextBusyError
            The runner is running already.
        ClosedError
        Exception
            Whatever reading ``requests`` raised, after everything that had been read is done.

        Notes
        -----
        Collections are read where this is called, anything else in a thread of its own, from beginning to end in the
        same. It is asked for one request at a time, and while it answers within a millisecond or so the runner waits
        for it: such an iterable never runs beside whoever takes the results, and batches do not depend on time. Wrap it
        in :class:`~llamastate.batch.Inline` if it has to be read in this thread. A thread that is kept waiting by its
        iterable when the run ends stays until that gives something; a request that it gives so late is added to
        :attr:`unfinished`.

        An iterator that is given up (closed) gives up what is under way: :attr:`unfinished` tells what that was. What
        the context has learnt of prefixes stays, for the next call.
        """
        if self._closed:
            raise ClosedError("the runner is closed", what="runner")
        itself: list[Any] = []
        results = self._guarded(Reader(iterator_of(requests)), itself)
        itself.append(weakref.ref(results))
        return results

    def _guarded(self, reader: Reader, itself: list[Callable[[], Any]]) -> Iterator[Result]:
        if not self._turn.acquire(blocking=False):
            raise ContextBusyError("run: the runner is running already", operation="run")
        ready: deque[tuple[Request | Malformed, Result]] = deque()
        unfinished: list[Request] = []
        try:
            self._active, self._reader, self._thread = itself[0], reader, threading.get_ident()
            self._stopping = False
            self._unfinished = unfinished
            if self._closed:
                raise ClosedError("the runner is closed", what="runner")
            yield from self._run(reader, ready)
        finally:
            unfinished += [item for item, _ in ready if isinstance(item, Request)]
            unfinished += [ticket.request for ticket in self._engine.abandon()]
            reader.close(lambda item: unfinished.append(item) if isinstance(item, Request) else None)
            self._reader = self._handed = None
            if self._closed:
                self._free()
            self._turn.release()

    def _run(self, reader: Reader, ready: deque[tuple[Request | Malformed, Result]]) -> Iterator[Result]:
        engine = self._engine
        reading, failure = True, None
        while True:
            while reading and not self._stopping and engine.n_waiting < self._window:
                try:
                    item = reader.read(busy=not engine.idle)
                except Exception as error:
                    # what was read before is not to be lost with it
                    reading, failure = False, error
                    break
                if item is NOTHING:
                    break
                if item is END:
                    reading = False
                    break
                started = time.perf_counter()
                self._submit(item, ready, started)
                engine.counts.prepare_seconds += time.perf_counter() - started
                if ready:
                    break
            if not ready and not engine.idle and not self._stopping:
                ready.extend((ticket.request, result) for ticket, result in engine.step())
            while ready:
                self._handed, result = ready.popleft()
                yield result
                self._thread = threading.get_ident()
            if self._stopping or (not reading and engine.idle):
                break
        if failure is not None:
            raise failure

    def _submit(self, item: Any, ready: deque[tuple[Request | Malformed, Result]], since: float) -> None:
        if isinstance(item, Malformed):
            self._engine.counts.failed += 1
            ready.append((item, Result(item.id, error=item.error, meta=item.meta)))
            return
        try:
            if not isinstance(item, Request):
                what = f"a request is {type(item).__name__}, no Request(id, prompt)"
                raise InvalidArgumentError(what, name="requests", value=item)
            self._engine.submit(item, since)
        except (LlamaStateError, TypeError, ValueError, AttributeError) as error:
            self._engine.counts.failed += 1
            typed = (
                error
                if isinstance(error, LlamaStateError)
                else InvalidArgumentError(f"no request: {error}", name="requests", value=item)
            )
            typed.__traceback__ = None
            times = Times(total=time.perf_counter() - since)
            id_, meta = getattr(item, "id", ""), getattr(item, "meta", None)
            ready.append((item, Result(id_, error=typed, meta=meta, times=times)))

    async def arun(
        self, requests: Iterable[Request | Malformed] | AsyncIterable[Request | Malformed]
    ) -> AsyncIterator[Result]:
        """:meth:`run` for asyncio: computes in a thread, the loop goes on.

        ``requests`` may be asynchronous as well; it is closed at the end. Cancelling ends it after the decode under
        way.
        """
        pulled = Pulled(requests) if isinstance(requests, AsyncIterable) else None
        results: Any = self.run(requests if pulled is None else pulled)  # type: ignore[arg-type]
        end = object()
        lost: list[Request] = []
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, results, end))
                try:
                    result = await asyncio.shield(step)
                except asyncio.CancelledError:
                    self.stop()
                    await settled(step)
                    if not step.cancelled() and step.exception() is None and isinstance(self._handed, Request):
                        lost += [self._handed] if step.result() is not end else []
                    raise
                if result is end:
                    return
                yield result  # type: ignore[misc]  # what is not the end is a result
        finally:
            results.close()
            self._unfinished[:0] = lost
            if pulled is not None:
                await pulled.aclose()

    def stop(self) -> None:
        """Let :meth:`run` end after the decode under way; results that are ready come still.

        From any thread, or a signal handler.
        """
        self._stopping = True

    @property
    def unfinished(self) -> tuple[Request, ...]:
        """What the last :meth:`run` had read and not handed back when it was stopped or given up."""
        return tuple(self._unfinished)

    # --- facts --------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> BatchStats:
        """What it has done and is doing. May be asked from any thread, also in the middle of a run."""
        engine = self._engine
        counts: Counts = engine.counts
        scheduler = engine.scheduler
        return BatchStats(
            counts.done,
            counts.failed,
            len(scheduler.running),
            len(scheduler.waiting),
            len(scheduler.parked),
            counts.prompt_tokens,
            counts.cached_tokens,
            counts.stored_tokens,
            counts.generated_tokens,
            counts.decodes,
            counts.decoded_tokens,
            scheduler.n_forks,
            scheduler.n_preemptions,
            scheduler.cells.used,
            engine.rules.n_cells or engine.rules.max_tokens * engine.rules.n_slots,
            counts.decode_seconds,
            counts.sample_seconds,
            counts.schedule_seconds,
            counts.store_seconds,
            counts.prepare_seconds,
        )

    @property
    def fixed_shapes(self) -> bool:
        """Whether outputs are the same in any company."""
        return self._engine.rules.grid is not None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._closed

    def close(self) -> None:
        """Free the context. The store stays open, and so does a model that was given. Idempotent.

        A run under way ends after its decode, and is waited for. Whoever closes the runner from inside what it reads is
        not: the context is freed when that run ends.
        """
        self._closed = True
        self._stopping = True
        wait = 0.0
        while not self._turn.acquire(timeout=wait):
            results, reader = self._active(), self._reader
            if results is not None:
                with contextlib.suppress(ValueError):  # it is just running, and will end
                    results.close()
                    continue
                if (reader is not None and reader.here) or self._thread == threading.get_ident():
                    return
            wait = 0.05
        try:
            self._free()
        finally:
            self._turn.release()

    def _free(self) -> None:
        self._engine.close()
        if self._loaded is not None:
            self._loaded.close()

    def __repr__(self) -> str:
        return f"<llamastate.batch.BatchRunner {'closed' if self._closed else f'of {self._engine.rules.n_slots}'}>"


def _within(name: str, value: object, low: int, high: int) -> int:
    number = as_index(value, name, InvalidArgumentError)
    if not low <= number <= high:
        raise InvalidArgumentError(f"{name} = {number} is not in [{low}, {high}]", name=name, value=value, limit=high)
    return number
