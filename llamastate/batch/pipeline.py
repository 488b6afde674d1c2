"""From a file of requests to a file of results, as often interrupted as may be."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, BinaryIO, Protocol

import msgspec

from llamastate.batch.journal import Index, Record, key_of, name_of, run_digest
from llamastate.batch.openai import MAX_LINE, Defaults, Line, Query, parse, read_line
from llamastate.batch.outfile import OutputFile, StreamOutput, open_output
from llamastate.batch.progress import Progress
from llamastate.batch.request import Request, Result
from llamastate.batch.responses import Names, error_line, response_line
from llamastate.errors import (
    BatchChangedError,
    FileAccessError,
    InvalidArgumentError,
    InvalidRequestError,
    LlamaStateError,
    StateFileNotFoundError,
)
from llamastate.words import brief

__all__ = ["BatchSummary", "Runner", "check_input", "run_batch"]

#: Names that an error about changed bodies tells, of any number.
_TELL = 8


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

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        rate = self.generated_tokens / self.seconds if self.seconds else 0.0
        return {**asdict(self), "prefix_hit_rate": self.hit_rate, "generated_tokens_per_second": rate}


def run_batch(
    input: Any,  # noqa: A002  # as the command calls it
    output: Any,
    *,
    model: Any = None,
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
        Go on with what is in ``output``. Without, it is emptied first.
    retry_errors : bool
        Take the errors out of ``output`` and try those requests again.
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
        For :class:`~llamastate.batch.BatchRunner`: ``n_parallel``, ``n_ctx``, ``store``, ...

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
        ``output`` is no output of this function.
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
    with contextlib.ExitStack() as stack:
        if runner is None:
            runner = stack.enter_context(_make_runner(model, options))
        elif options:
            name = min(options)
            raise InvalidArgumentError(f"{name} is for a runner that is made here", name=name, value=options[name])
        facts, names = facts_of(runner, defaults), names_of(runner, model_name)
        run = _Run(source, open_output(output, facts, interval=sync_seconds), runner, facts, defaults)
        run.names, run.on_progress, run.on_result = names, on_progress, on_result
        return run.go(resume=resume, retry_errors=retry_errors, on_change=on_change, handle_signals=handle_signals)


def check_input(input: Any) -> None:  # noqa: A002
    """Find out whether there is an input at all, before anything is loaded for it.

    Raises
    ------
    StateFileNotFoundError, FileAccessError
    """
    source = Source(input)
    if source.again:
        source._open().close()


def _make_runner(model: Any, options: dict[str, Any]) -> Any:
    from llamastate.batch.runner import BatchRunner
    from llamastate.model import Model

    @contextlib.contextmanager
    def made() -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            loaded = model if isinstance(model, Model) else stack.enter_context(Model(model))
            yield stack.enter_context(BatchRunner(loaded, **options))

    return made()


def facts_of(runner: Any, defaults: Defaults) -> dict[str, Any]:
    """What decides results, of the model, the runner and the defaults; not how many requests run at once."""
    facts: dict[str, Any] = {"format": 1, **runner.ctx.fingerprint.to_dict()}
    facts["fingerprint"] = facts.pop("version")
    return {**facts, **asdict(defaults)}


def names_of(runner: Any, model_name: str | None) -> Names:
    """What responses are told by."""
    model = runner.model
    name = model_name or (os.path.basename(model.path) if model.path else str(model.desc))
    return Names(name, lambda token: bytes(model.token_to_piece(token, special=True)))


# --- input ------------------------------------------------------------------------------------------------------------


class Source:
    """Lines, read as they are asked for. What is a file can be read again."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self.path: str | None = None
        if isinstance(given, (str, bytes, os.PathLike)) and given not in ("-", b"-"):
            self.path = os.fsdecode(given)
            try:
                if os.path.isdir(self.path):
                    raise IsADirectoryError(errno.EISDIR, "Is a directory", self.path)
                self._stat = os.stat(self.path)
            except FileNotFoundError:
                raise StateFileNotFoundError(f"there is no {self.path!r}", path=self.path, reason="not there") from None
            except (OSError, ValueError) as error:
                raise _unreadable(self.path, error) from None

    @property
    def again(self) -> bool:
        """Whether it can be read more than once."""
        return self.path is not None and stat.S_ISREG(self._stat.st_mode)

    @property
    def stamp(self) -> list[int] | None:
        """Tells a file from the same one changed."""
        return [self._stat.st_size, self._stat.st_mtime_ns] if self.again else None

    def count(self) -> int | None:
        """Lines, blank ones too."""
        if not self.again:
            return None
        n, last = 0, b"\n"
        with self._open() as file:
            while chunk := file.read(1 << 20):
                n, last = n + chunk.count(b"\n"), chunk
        return n + (not last.endswith(b"\n"))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbered from 1, without the blank ones."""
        for number, raw in enumerate(self._raw(), 1):
            if raw.strip():
                yield number, raw

    def _raw(self) -> Iterator[bytes]:
        if self.path is not None:
            with self._open() as file:
                yield from _read(file, self.path)
        elif self._given in ("-", b"-"):
            yield from _read(sys.stdin.buffer, "-")
        elif hasattr(self._given, "readline"):
            yield from _read(self._given, "the input")
        else:
            for item in self._given:
                yield _as_line(item)

    def _open(self) -> BinaryIO:
        try:
            return open(str(self.path), "rb")
        except OSError as error:
            raise _unreadable(str(self.path), error) from None


def _read(file: BinaryIO, path: str) -> Iterator[bytes]:
    while True:
        try:
            raw = file.readline(MAX_LINE + 1)
            if len(raw) > MAX_LINE:
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass  # nothing of so long a line is kept
        except OSError as error:
            raise _unreadable(path, error) from None
        if not raw:
            return
        yield raw


def _as_line(item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    try:
        return msgspec.json.encode(dict(item) if isinstance(item, Mapping) else item)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"an item of the input is no JSON: {error}", name="input", value=item) from None


def _unreadable(path: str, error: Exception) -> FileAccessError:
    reason = getattr(error, "strerror", None) or str(error)
    return FileAccessError(
        f"cannot read {path!r}: {reason}", path=path, reason=reason, code=getattr(error, "errno", None)
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


class Placing:
    """The lines of an input, each with the name that its result goes by."""

    def __init__(self, source: Source, index: Index | None = None) -> None:
        self._source = source
        self._index = index or Index()

    def lines(self) -> Iterator[tuple[Line, bytes]]:
        """All of them, once."""
        index = self._index
        for number, raw in self._source.lines():
            line = read_line(raw, number)
            if line.custom_id is not None:
                name = name_of(line.custom_id, "")
                if not index.see(name):
                    yield line, name
                    continue
                line = _repeated(line, raw)
            # what it says is all that tells such a line from others, and a count where they say the same
            n = index.see(name_of(None, line.digest.hex()))
            if n:
                line = replace(line, digest=_digest(b"%d " % n + line.digest))
            yield line, name_of(None, key_of(line, "").body)

    def close(self) -> None:
        """Let go of what it has counted."""
        self._index.close()


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
        self.unfinished = 0
        self.began = 0.0

    def go(self, *, resume: bool, retry_errors: bool, on_change: str, handle_signals: bool) -> BatchSummary:
        reason = "failed"
        try:
            if isinstance(self.output, OutputFile):
                self.prepare(self.output, resume=resume, retry_errors=retry_errors, on_change=on_change)
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

    def prepare(self, output: OutputFile, *, resume: bool, retry_errors: bool, on_change: str) -> None:
        """Find what is done already, and refuse or remove what has changed."""
        if not resume:
            output.open(None, anew=True, input=self.source.stamp)
            return
        dropped = output.scan(self.index, on_change=on_change, drop_failed=retry_errors)
        stamp = self.source.stamp
        if output.n_found and self.source.again and (stamp is None or stamp != output.journal.input):
            dropped += self.compare(output, on_change)
        elif on_change == "redo" and output.n_found and not self.source.again:
            raise InvalidArgumentError(
                "on_change='redo' needs an input that can be read twice", name="on_change", value=on_change
            )

        def keep(record: Record) -> bool:
            """As the index has it, and once."""
            return self.index.get(record.name) == record.key and not self.index.see(b"kept" + record.name)

        output.open(keep if dropped else None, input=stamp)

    def compare(self, output: OutputFile, on_change: str) -> int:
        """Look for requests that are not what was answered under their names; forget those answers."""
        changed: list[str] = []
        count = 0
        with contextlib.closing(Placing(self.source)) as placing:
            for line, name in placing.lines():
                key = self.index.get(name)
                if key is not None and key.body != key_of(line, self.run).body:
                    count += 1
                    if len(changed) < _TELL:
                        changed.append(str(line.custom_id))
                    if on_change == "redo":
                        self.index.remove(name)
        if count and on_change == "error":
            raise _changed(output.path, changed, count)
        return count

    # --- one line after the other -------------------------------------------------------------------------------------

    def requests(self) -> Iterator[Request]:
        """What the runner reads."""
        try:
            for line, name in Placing(self.source, self.index).lines():
                if self.stopped is not None:
                    return
                self.progress.read += 1
                key = key_of(line, self.run)
                if (found := self.index.get(name)) is not None:
                    if found != key:
                        raise _changed(self.output.path, [str(line.custom_id)], 1)
                    self.progress.skipped += 1
                    continue
                try:
                    if line.error is not None:
                        raise line.error
                    query = parse(line, self.defaults)
                except InvalidRequestError as error:
                    self.write(error_line(key.id, line, error), failed=True)
                    continue
                self.unfinished += 1
                yield from query.requests(Pending(key.id, query))
        except LlamaStateError as error:
            # a runner takes what its source raises for an error of one request
            self.failure = error

    def loop(self) -> None:
        results = self.runner.run(self.requests())
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
        if pending.error is not None:
            self.write(error_line(pending.key, pending.query.line, pending.error), failed=True)
        else:
            self.write(response_line(pending.key, pending.query, pending.results, self.names))

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
            errors_before=getattr(self.output, "n_failed_found", 0),
            stopped=self.stopped,
            unfinished=self.unfinished,
            prompt_tokens=p.prompt_tokens,
            cached_tokens=p.cached_tokens,
            generated_tokens=p.generated_tokens,
            seconds=time.perf_counter() - self.began,
            runner=asdict(stats) if is_dataclass(stats) and not isinstance(stats, type) else {},
        )


def _changed(path: str, names: list[str], count: int) -> BatchChangedError:
    told = ", ".join(map(repr, names)) + (", ..." if count > len(names) else "")
    return BatchChangedError(
        f"{path!r} has answers to other requests by the names {told}: redo them (on_change), or write to another file",
        path=path, field="body", custom_ids=tuple(names), count=count,
    )  # fmt: skip


def _repeated(line: Line, raw: bytes) -> Line:
    """A line whose custom_id an earlier one had: its error cannot go by that name, which is the earlier one's."""
    error = InvalidRequestError(
        f"line {line.number}: custom_id {brief(line.custom_id)} was used before",
        code="duplicate_custom_id", param="custom_id", line=line.number, custom_id=line.custom_id, reason="used before",
    )  # fmt: skip
    return Line(line.number, None, "", b"", _digest(raw.strip()), error)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=b"line").digest()
