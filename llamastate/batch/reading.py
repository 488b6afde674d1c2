"""Where a runner's requests come from: whatever may keep it waiting is read beside it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import queue
import threading
import time
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

__all__ = ["END", "NOTHING", "Inline", "Pulled", "Reader", "Threaded", "iterator_of"]

#: There is no more.
END: Any = object()
#: There is nothing yet.
NOTHING: Any = object()

#: Seconds that a request is waited for although there is something to compute: what comes so soon is read as if it had
#: been there, so that batches do not depend on time.
QUICK = 0.001
#: Seconds beyond that which a source may be late in all, made up for by all that is quick.
CREDIT = 0.1
#: How often somebody who waits looks whether the run is to end.
LOOK = 0.1


class Inline:
    """Requests that are to be read in the thread that runs them: for an iterable that is bound to it.

    :meth:`BatchRunner.run <llamastate.batch.BatchRunner.run>` reads anything but a collection in a thread of its own,
    as it could keep it waiting. This is for what would not, or says so itself: an item may be a
    ``concurrent.futures.Future``, which means that there is nothing before it is done.

    Parameters
    ----------
    requests : iterable
    """

    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


class _Beside:
    """Items that are asked for one by one, and come when they come: until then there is the future of the next.

    What is read runs only between being asked and answering. So it never meets whoever asks in the middle of something,
    but for what takes its time.
    """

    def __init__(self) -> None:
        self._coming: Future[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        coming = self._coming
        if coming is None:
            coming = self._coming = Future()
            self._ask(coming)
        if not coming.done():
            return coming
        self._coming = None
        item = coming.result()
        if item is END:
            raise StopIteration
        return item

    def _ask(self, coming: Future[Any]) -> None:
        raise NotImplementedError

    def close(self, late: Callable[[Any], None]) -> None:
        """Ask no more; ``late`` is called with what comes all the same."""
        coming, self._coming = self._coming, None
        if coming is not None:

            def done(future: Future[Any]) -> None:
                if future.exception() is None and future.result() is not END:
                    late(future.result())

            coming.add_done_callback(done)


class Threaded(_Beside):
    """An iterable that is read in one thread of its own, from its first item to its end.

    The thread is gone with :meth:`close`. Only one that is being kept waiting stays until it gets its item; it does not
    keep the process from ending.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__()
        self._items: Iterable[Any] | None = items
        self._asked: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def here(self) -> bool:
        """Whether this is called by what is read."""
        return self._thread is threading.current_thread()

    def _ask(self, coming: Future[Any]) -> None:
        if self._thread is None:
            # the only reference to the iterable goes along, so that it ends in the thread where it has run
            items, self._items = self._items, None
            context = contextvars.copy_context()
            self._thread = threading.Thread(
                target=context.run, args=(_serve, [items], self._asked), name="llamastate-read", daemon=True
            )
            del items
            self._thread.start()
        self._asked.put(coming)

    def close(self, late: Callable[[Any], None]) -> None:
        """Let the thread end, and wait for it unless it is kept waiting itself."""
        waits = self._coming is not None and not self._coming.done()
        super().close(late)
        self._asked.put(None)
        self._items = None
        if self._thread is not None and not waits and not self.here:
            self._thread.join(1.0)  # it is at its end, unless the iterable's own end takes long

    def __del__(self) -> None:
        self._asked.put(None)


def _serve(given: list[Any], asked: queue.SimpleQueue[Future[Any] | None]) -> None:
    iterator: Any = None
    while (coming := asked.get()) is not None:
        try:
            if iterator is None:
                iterator = iter(given.pop())
            item = next(iterator, END)
        except BaseException as error:
            coming.set_exception(error)
        else:
            coming.set_result(item)
            item = None
        coming = None


class Pulled(_Beside):
    """An asynchronous iterable, read by its loop for another thread. Made in the loop."""

    def __init__(self, items: AsyncIterable[Any]) -> None:
        super().__init__()
        self._source = aiter(items)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def _ask(self, coming: Future[Any]) -> None:
        self._loop.call_soon_threadsafe(self._begin, coming)

    def _begin(self, coming: Future[Any]) -> None:
        if self._closed:
            coming.set_result(END)
        else:
            self._task = self._loop.create_task(self._pull(coming))

    async def _pull(self, coming: Future[Any]) -> None:
        try:
            item = await anext(self._source, END)
        except BaseException as error:
            coming.set_exception(error)
        else:
            coming.set_result(item)

    async def aclose(self) -> None:
        """End it, also in the middle of waiting for its next item."""
        self._closed = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await settled(self._task)
        close = getattr(self._source, "aclose", None)
        if close is not None:
            await close()


async def settled(task: asyncio.Future[Any]) -> None:
    """Wait until it is done, however often that is cancelled."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])


def iterator_of(requests: Any) -> Iterator[Any]:
    """What gives these requests without keeping anybody waiting."""
    if isinstance(requests, (_Beside, Inline, Collection)) or type(requests) in _ITERATORS:
        return iter(requests)
    return Threaded(requests)


#: Over what is there already.
_ITERATORS = {type(iter(made())) for made in (list, tuple, dict, set, str)} | {type(iter(range(0)))}


class Reader:
    """Requests one by one, for a runner that has something to do while there are none.

    Parameters
    ----------
    source : iterator
        Of requests, and of futures: there is nothing before those are done.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source: Iterator[Any] = source
        self._coming: Future[Any] | None = None
        self._credit = CREDIT

    def read(self, *, busy: bool) -> Any:
        """The next one, :data:`END`, or :data:`NOTHING`; and whatever reading raises.

        ``busy`` is whether there is something better to do than waiting.
        """
        while True:
            if self._coming is not None:
                if not self._coming.done():
                    if busy:
                        return NOTHING
                    concurrent.futures.wait([self._coming], LOOK)
                    if not self._coming.done():
                        return NOTHING
                self._coming = None
            item = next(self._source, END)
            if not isinstance(item, Future):
                return item
            self._coming = item
            if busy:
                self._wait(item)

    def _wait(self, coming: Future[Any]) -> None:
        started = time.perf_counter()
        concurrent.futures.wait([coming], QUICK + self._credit)
        late = time.perf_counter() - started - QUICK
        self._credit = min(CREDIT, max(0.0, self._credit - late))

    @property
    def here(self) -> bool:
        """Whether this is called by what is read, in a thread of its own."""
        return isinstance(self._source, Threaded) and self._source.here

    def close(self, late: Callable[[Any], None]) -> None:
        """Ask no more; ``late`` is called with what was asked for already, now or when it comes."""
        source, self._source = self._source, iter(())
        self._coming = None
        if isinstance(source, _Beside):
            source.close(late)
