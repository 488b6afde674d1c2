"""Batches of Ray Data side by side on one runner: the next one's rows run before the last one's are done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from llamastate.batch import BatchRunner, Inline
from llamastate.interop import rayrows

if TYPE_CHECKING:
    import pyarrow as pa

    from llamastate.batch.request import Malformed, Request

__all__ = ["Service"]


class Service:
    """A runner that goes on while batches come and go.

    Parameters
    ----------
    runner : BatchRunner
        Run in a thread of the service's own, from the first batch on; nobody else may.
    reader : Reader
        What makes requests of rows, asked in that thread only.
    strict : bool
        A row that fails fails its batch.
    """

    def __init__(self, runner: BatchRunner, reader: rayrows.Reader, *, strict: bool) -> None:
        self._runner = runner
        self._reader = reader
        self._strict = strict
        self._lock = threading.Lock()
        #: Batches that the runner has not been given yet, and the promise of the next one.
        self._waiting: deque[_Batch] = deque()
        self._coming: Future[None] = Future()
        #: Those that it has begun; changed by its thread alone. A batch is in one of the two until it is done.
        self._begun: set[_Batch] = set()
        self._thread: threading.Thread | None = None

    def answers(self, table: pa.Table) -> list[dict[str, Any]]:
        """What becomes of a batch's rows, in their order. Waits for it; any number of threads may.

        Raises
        ------
        LlamaStateError
            The error of a row, if they are not to have errors; or what ended the run.
        """
        batch = _Batch(table)
        if batch.left:
            with self._lock:
                if self._thread is None:
                    # it does not keep an actor alive
                    thread = threading.Thread(target=self._serve, name="llamastate-ray", daemon=True)
                    thread.start()
                    self._thread = thread
                self._waiting.append(batch)
                if not self._coming.done():
                    self._coming.set_result(None)
        return batch.done.result()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        with self._lock:
            return not self._waiting and not self._begun

    def _serve(self) -> None:
        while True:
            self._promise().result()
            try:
                for result in self._runner.run(Inline(self._requests())):
                    index, facts = rayrows.answer(result)
                    batch = result.meta.owner
                    if result.error is not None and self._strict:
                        self._fail(batch, result.error)
                    else:
                        self._answer(batch, index, facts)
            except BaseException as error:
                # The run is over for everything that it had read. What comes next may fare better.
                begun = list(self._begun)
                if not begun:  # it did not come so far
                    with self._lock:
                        begun = list(self._waiting)
                        self._waiting.clear()
                for batch in begun:
                    self._fail(batch, error)

    def _promise(self) -> Future[None]:
        """Done as soon as a batch waits."""
        with self._lock:
            if self._coming.done() and not self._waiting:
                self._coming = Future()
            return self._coming

    def _requests(self) -> Iterator[Request | Malformed | Future[None]]:
        while True:
            promise = self._promise()
            if not promise.done():
                yield promise  # the runner goes on with what it has
                continue
            with self._lock:
                batch = self._waiting.popleft()
                self._begun.add(batch)
            for item in self._reader.read(batch.table, batch):
                if batch.done.done():
                    break  # it has failed
                if isinstance(item, rayrows.Answered):
                    self._answer(batch, item.index, item.facts)
                else:
                    yield item

    def _answer(self, batch: _Batch, index: int, facts: dict[str, Any]) -> None:
        batch.answers[index] = facts
        batch.left -= 1
        if not batch.left and not batch.done.done():
            self._begun.discard(batch)
            batch.done.set_result(batch.answers)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        self._begun.discard(batch)
        if not batch.done.done():
            batch.done.set_exception(error)


class _Batch:
    """A table on its way: its answers come in any order."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.answers: list[dict[str, Any]] = [{}] * table.num_rows
        self.left = table.num_rows
        self.done: Future[list[dict[str, Any]]] = Future()
        if not self.left:
            self.done.set_result(self.answers)
