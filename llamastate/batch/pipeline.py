"""From a file of requests to a file of results, as often interrupted as may be."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llamastate.batch import choices
from llamastate.batch.journal import Index, key_of, run_digest
from llamastate.batch.openai import Defaults, Line, Query, internal, parse
from llamastate.batch.outfile import OutputFile, StreamOutput, open_output
from llamastate.batch.progress import Progress
from llamastate.batch.reading import Inline, Threaded
from llamastate.batch.request import Request, Result
from llamastate.batch.responses import Names, error_code, error_line, response_line
from llamastate.batch.resume import Placing, changed, take_up
from llamastate.batch.source import Input, Output, Source, require_apart
from llamastate.errors import InvalidArgumentError, InvalidRequestError, LlamaStateError
from llamastate.prefix.chain import portable

if TYPE_CHECKING:
    from llamastate.model import Model

__all__ = ["BatchSummary", "Runner", "run_batch"]


class Runner(Protocol):
    """What :func:`run_batch` needs of :class:`~llamastate.batch.BatchRunner`."""

    model: Any
    ctx: Any

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Read requests as there is room for them; give their results as they are ready."""

    def stop(self) -> None:
        """End :meth:`run` soon. Called by signal handlers and other threads."""


@dataclass(frozen=True)
class BatchSummary:
    """How a run ended.

    Attributes
    ----------
    output : str
    completed, failed : int
        Results that this run wrote; ``failed`` are errors.
    skipped : int
        Lines whose results were there already.
    errors_before : int
        Results that were there already and are errors.
    stopped : str or None
        The signal that ended the run before its time; "stop" for :meth:`Runner.stop`.
    unfinished : int
        Requests that were read and are not in the output, for that reason. The next run has them again.
    prompt_tokens, cached_tokens, generated_tokens : int
    seconds : float
        From the first line to the last.
    runner : dict
        The runner's own figures.
    full : int
        Results in the output that were cut off because there was no room for more.
    errors : dict
        How many of ``failed`` there are of each code.
    first_error : str or None
        What the first of them says.
    """

    output: str
    completed: int
    failed: int
    skipped: int
    errors_before: int
    stopped: str | None
    unfinished: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seconds: float
    runner: dict[str, Any] = field(default_factory=dict)
    full: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    first_error: str | None = None

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        rate = self.generated_tokens / self.seconds if self.seconds else 0.0
        return {**asdict(self), "prefix_hit_rate": self.hit_rate, "generated_tokens_per_second": rate}


def run_batch(
    input: Input | Source,  # noqa: A002  # as the command calls it
    output: Output,
    *,
    model: Model | str | os.PathLike[str] | None = None,
    runner: Runner | None = None,
    resume: bool = True,
    retry_errors: bool = False,
    on_change: str = "error",
    defaults: Defaults | None = None,
    model_name: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_result: Callable[[Result], None] | None = None,
    handle_signals: bool = False,
    sync_seconds: float = 1.0,
    **options: Any,
) -> BatchSummary:
    """Answer every request of a file, and be able to go on wherever it was ended.

    Parameters
    ----------
    input : path-like, "-", binary file, or iterable of bytes, str or mapping
        OpenAI's batch format, a request a line. Read as it is needed, never whole.
    output : path-like, "-" or binary file
        Results are added to it as they are ready; they carry the requests' ``custom_id``. Beside it
        ``<output>.journal`` is kept, and ``<output>.lock`` while it is written to.
    model : Model or path-like, optional
        Or ``runner``.
    runner : Runner, optional
        Made of ``model`` and ``options`` otherwise, and closed at the end.
    resume : bool
        Go on with what is in ``output``. Without, it is emptied first, if its first line is of this function.
    retry_errors : bool
        Take the errors out of ``output`` and try those requests again; so too those whose answers were cut off because
        there was no room for more.
    on_change : {"error", "redo"}
        What becomes of results whose request, model or options have changed since.
    defaults : Defaults, optional
        For requests that do not say.
    model_name : str, optional
        For the responses; the file's name if not given.
    on_progress : callable, optional
        Called at the beginning and after every result with the :class:`Progress`.
    on_result : callable, optional
        Called with every :class:`Result`, before its line is written.
    handle_signals : bool
        Let SIGINT and SIGTERM end the run in good order (main thread only): no new request is begun, what is ready is
        written. A second one ends it at once; nothing that was written is lost then either.
    sync_seconds : float
        Until a result survives a loss of power; the end of the process it survives at once.
    **options
        For :class:`~llamastate.batch.BatchRunner`: ``n_parallel``, ``n_ctx``, ``store``, ... With ``flash_attn="auto"``
        the first lines of a file, or the results that are there, decide (:func:`~llamastate.batch.flash_attn_for`).

    Returns
    -------
    BatchSummary

    Raises
    ------
    BatchChangedError
        ``output`` has results of another run or other requests, and ``on_change`` is "error". They stay as they are.
    OutputMovedError
        ``output`` is not where it was. Put it back to go on.
    StoreLockedError
        Another run writes to ``output``.
    StoreFullError
        The disk is full; a later run goes on.
    CorruptStateError
        ``output`` is no output of this function, or its journal no journal. Nothing was changed.
    InvalidArgumentError
        ``input`` and ``output`` are one file, say.
    StateFileNotFoundError, FileAccessError
        There is no input, or it cannot be read.

    Notes
    -----
    Every ``custom_id`` is in ``output`` once, however often the run was killed. Memory does not grow with the number of
    requests.

    Examples
    --------
    >>> summary = run_batch("in.jsonl", "out.jsonl", model="model.gguf", n_parallel=16)  # doctest: +SKIP
    """
    if on_change not in ("error", "redo"):
        raise InvalidArgumentError(
            f"on_change is {on_change!r}, not 'error' or 'redo'", name="on_change", value=on_change
        )
    if (model is None) == (runner is None):
        raise InvalidArgumentError("give a model or a runner, one of them", name="runner", value=runner)
    defaults = defaults or Defaults()
    source = input if isinstance(input, Source) else Source(input)
    require_apart(input=source, output=output)
    with contextlib.ExitStack() as stack:
        if runner is None:
            results = results_of(output) if resume else None
            runner = stack.enter_context(_make_runner(model, options, source, results, defaults))
        elif options:
            name = min(options)
            raise InvalidArgumentError(f"{name} is for a runner that is made here", name=name, value=options[name])
        facts, names = facts_of(runner, defaults), names_of(runner, model_name)
        run = _Run(source, open_output(output, facts, interval=sync_seconds), runner, facts, defaults)
        run.names, run.on_progress, run.on_result = names, on_progress, on_result
        return run.go(resume=resume, retry_errors=retry_errors, on_change=on_change, handle_signals=handle_signals)


def results_of(output: Output) -> str | None:
    """The path of an output that can be gone on with."""
    if not isinstance(output, (str, bytes, os.PathLike)) or output in ("-", b"-"):
        return None
    with contextlib.suppress(ValueError):  # it is told where it is opened
        return os.path.realpath(os.fsdecode(output))
    return None


def _make_runner(
    model: Any, options: dict[str, Any], source: Source, results: str | None, defaults: Defaults
) -> contextlib.AbstractContextManager[Any]:
    from llamastate.batch.runner import BatchRunner
    from llamastate.model import Model

    @contextlib.contextmanager
    def made() -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            loaded = model if isinstance(model, Model) else stack.enter_context(Model(model))
            chosen = choices.settled(options, source, results, loaded, defaults)
            yield stack.enter_context(BatchRunner(loaded, **chosen))

    return made()


def facts_of(runner: Any, defaults: Defaults) -> dict[str, Any]:
    """What decides results, of the model, the runner and the defaults; not how many requests run at once."""
    ctx = runner.ctx
    # into how many streams the cache is split follows from how many run, and changes nothing
    facts: dict[str, Any] = {"format": 1, **portable(ctx.fingerprint, ctx.schema).to_dict()}
    facts["fingerprint"] = facts.pop("version")
    facts["fixed_shapes"] = bool(getattr(runner, "fixed_shapes", False))
    return {**facts, **asdict(defaults)}


def names_of(runner: Any, model_name: str | None) -> Names:
    """What responses are told by."""
    model = runner.model
    name = model_name or (os.path.basename(os.fsdecode(model.path)) if model.path else str(model.desc))
    # the name of a file can be what no JSON can hold
    return Names(
        name.encode("utf-8", "backslashreplace").decode(),
        lambda token: bytes(model.token_to_piece(token, special=True)),
    )


# --- the run ----------------------------------------------------------------------------------------------------------


class Pending:
    """A line that is being answered."""

    __slots__ = ("error", "key", "left", "query", "results")

    def __init__(self, key: str, query: Query) -> None:
        self.key, self.query = key, query
        self.results: list[Result | None] = [None] * len(query)
        self.left = len(query)
        self.error: LlamaStateError | None = None

    def put(self, i: int, result: Result) -> bool:
        """Take one of its results; whether it was the last."""
        self.results[i] = result
        self.left -= 1
        if self.error is None:
            self.error = result.error
        return not self.left

    def response(self, names: Names) -> bytes | LlamaStateError:
        """The line of it, once all its requests are done; or why there is none."""
        if self.error is not None:
            return self.error
        try:
            results = [result for result in self.results if result is not None]
            return response_line(self.key, self.query, results, names)
        except Exception as error:  # one that cannot be written is no reason to lose the others
            return internal(error)


class _Run:
    names: Names
    on_progress: Callable[[Progress], None] | None
    on_result: Callable[[Result], None] | None

    def __init__(
        self,
        source: Source,
        output: OutputFile | StreamOutput,
        runner: Runner,
        facts: Mapping[str, Any],
        defaults: Defaults,
    ) -> None:
        self.source, self.output, self.runner, self.defaults = source, output, runner, defaults
        self.run = run_digest(facts)
        self.index = Index()
        self.progress = Progress()
        self.stopped: str | None = None
        self.failure: LlamaStateError | None = None
        self.unfinished = self.full = 0
        self.errors: Counter[str] = Counter()
        self.first_error: str | None = None
        self.began = 0.0

    def go(self, *, resume: bool, retry_errors: bool, on_change: str, handle_signals: bool) -> BatchSummary:
        reason = "failed"
        try:
            if isinstance(self.output, OutputFile):
                take_up(
                    self.output,
                    self.source,
                    self.index,
                    self.run,
                    resume=resume,
                    retry_errors=retry_errors,
                    on_change=on_change,
                )
            self.began = time.perf_counter()
            if self.on_progress is not None:
                self.progress.total = self.source.count()
                self.on_progress(self.progress)
            with self.signals() if handle_signals else contextlib.nullcontext():
                self.loop()
            if self.failure is not None:
                raise self.failure
            reason = self.stopped or "done"
        except KeyboardInterrupt:
            reason = "KeyboardInterrupt"
            raise
        finally:
            self.index.close()
            self.output.close(reason=reason, failed=self.progress.failed)
        return self.summary()

    # --- one line after the other -------------------------------------------------------------------------------------

    def requests(self) -> Iterator[Any]:
        """What the runner reads, in its own thread: what is written here is not to meet what is written there."""
        try:
            lines = Placing(self.source, self.index).lines()
            for item in lines if self.source.again else Threaded(lines):
                if isinstance(item, Future):  # a pipe that is quiet
                    yield item
                    continue
                if self.stopped is not None:
                    return
                line, name = item
                self.progress.read += 1
                key = key_of(line, self.run)
                if (found := self.index.get(name)) is not None:
                    if found != key:
                        raise changed(self.output.path, [str(line.custom_id)], 1)
                    self.progress.skipped += 1
                    continue
                try:
                    if line.error is not None:
                        raise line.error
                    query = parse(line, self.defaults)
                except InvalidRequestError as error:
                    self.fail(key.id, line, error)
                    continue
                self.unfinished += 1
                yield from query.requests(Pending(key.id, query))
        except LlamaStateError as error:
            # a runner takes what its source raises for an error of one request
            self.failure = error

    def loop(self) -> None:
        results = self.runner.run(Inline(self.requests()))
        try:
            for result in results:
                self.take(result)
                if self.failure is not None:
                    break
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()
        if self.unfinished and self.stopped is None and self.failure is None:
            self.stopped = "stop"

    def take(self, result: Result) -> None:
        pending, i = result.meta
        if self.on_result is not None:
            self.on_result(result)
        if not pending.put(i, result):
            return
        self.unfinished -= 1
        progress = self.progress
        for one in pending.results:
            progress.prompt_tokens += one.n_prompt
            progress.cached_tokens += one.n_cached
            progress.generated_tokens += one.n_generated
        found = pending.response(self.names)
        if isinstance(found, bytes):
            self.full += any(output.finish_reason == "full" for one in pending.results for output in one.outputs)
            self.write(found)
        else:
            self.fail(pending.key, pending.query.line, found)

    def fail(self, key: str, line: Line, error: LlamaStateError) -> None:
        self.errors[error_code(error)] += 1
        self.first_error = self.first_error or str(error)
        self.write(error_line(key, line, error), failed=True)

    def write(self, line: bytes, *, failed: bool = False) -> None:
        self.output.write(line)
        self.progress.done += 1
        self.progress.failed += failed
        self.progress.seconds = time.perf_counter() - self.began
        if self.on_progress is not None:
            self.on_progress(self.progress)

    # --- the end ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def stop(number: int, _: Any) -> None:
            self.stopped = signal.Signals(number).name
            for one, handler in before.items():  # the next one is for who does not want to wait
                signal.signal(one, handler)
            self.runner.stop()

        for number in numbers:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def summary(self) -> BatchSummary:
        p = self.progress
        stats = getattr(self.runner, "stats", None)
        return BatchSummary(
            output=self.output.path,
            completed=p.done - p.failed,
            failed=p.failed,
            skipped=p.skipped,
            errors_before=self.output.n_failed_found,
            stopped=self.stopped,
            unfinished=self.unfinished,
            prompt_tokens=p.prompt_tokens,
            cached_tokens=p.cached_tokens,
            generated_tokens=p.generated_tokens,
            seconds=time.perf_counter() - self.began,
            runner=asdict(stats) if is_dataclass(stats) and not isinstance(stats, type) else {},
            full=self.full + self.output.n_full_found,
            errors=dict(self.errors),
            first_error=self.first_error,
        )
