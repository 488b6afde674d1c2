"""Where requests come from: quiet, failing, bound to a thread, closed in the middle. Nothing hangs or is lost."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import queue
import select
import signal
import threading
import time
from concurrent.futures import Future

import pytest

from llamastate.batch import BatchRunner, Inline, Malformed, Request, reading
from llamastate.errors import ClosedError, ContextBusyError, InvalidArgumentError, SamplerError
from tests import children
from tests.conftest import THREADS
from tests.helpers import model, tokens


def runner(**params):
    return BatchRunner(model("dense"), **{"n_parallel": 4, "n_spare": 2, "n_ctx": 1024, "n_threads": THREADS, **params})


def request(i, **fields):
    return Request(str(i), tokens(12, i), **{"max_tokens": 5, **fields})


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "llamastate-read"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    deadline = time.monotonic() + 10
    while readers():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what keeps waiting -----------------------------------------------------------------------------------------------


def test_what_is_there_is_run_while_more_is_awaited():
    """A client that sends its next request when it has the answer to the last."""
    asked = queue.SimpleQueue()
    with runner() as r:
        asked.put(request(0))
        for n, result in enumerate(r.run(iter(asked.get, None)), 1):
            assert result.id == str(n - 1)
            asked.put(request(n) if n < 5 else None)
        assert n == 5


def test_those_under_way_go_on():
    """Nothing waits for the source as long as something runs."""
    more = threading.Event()

    def requests():
        yield from (request(i, max_tokens=3 + i) for i in range(3))
        assert more.wait(60)
        yield request(3)

    with runner() as r:
        results = r.run(requests())
        assert [next(results).id for _ in range(3)] == ["0", "1", "2"]
        more.set()
        assert [x.id for x in results] == ["3"]


def test_stopped_while_waiting():
    """The run ends at once; what comes later is not lost."""
    more, got = threading.Event(), []

    def requests():
        yield request(0)
        more.wait()
        yield request(1)

    with runner() as r:
        for result in r.run(requests()):
            got.append(result.id)
            threading.Timer(0.05, r.stop).start()
        assert got == ["0"]
        assert r.unfinished == ()
        assert len(readers()) == 1
        assert len(list(r.run([request(2)]))) == 1
        stopped = r.run(requests())
        next(stopped)
        threading.Timer(0.05, r.stop).start()
        assert list(stopped) == []
        assert len(readers()) == 2
        more.set()
        while readers():
            time.sleep(0.01)
        assert [q.id for q in r.unfinished] == ["1"]


def test_a_signal_is_heard_while_waiting():
    """Ctrl-C where nothing comes and nothing runs."""
    more = threading.Event()

    def requests():
        yield request(0)
        more.wait()

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # what runs in the background may have been told to ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with runner() as r:
            results = r.run(requests())
            next(results)
            threading.Timer(0.1, interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                next(results)
            more.set()
            assert len(list(r.run([request(1)]))) == 1
    finally:
        more.set()
        signal.signal(signal.SIGINT, before)


def test_futures_say_when_there_is_more():
    """A source that is read here, and never keeps anybody waiting."""
    here, coming = set(), Future()

    def requests():
        here.add(threading.get_ident())
        yield request(0)
        yield coming
        assert coming.done()
        yield request(coming.result())

    with runner() as r:
        results = r.run(Inline(requests()))
        assert next(results).id == "0"
        coming.set_result(7)
        assert [x.id for x in results] == ["7"]
    assert here == {threading.get_ident()}


def test_a_pipe_that_is_quiet():
    """The command answers what it has; SIGTERM ends it although nothing more comes."""
    code = "import sys; from llamastate.cli import main; sys.exit(main(sys.argv[1:]))"
    path = model("dense", vocab="spm").path
    with children.start(code, "run-batch", "-i", "-", "-o", "-", "-m", path, "-c", 1024, "-t", 1, "-q") as process:
        for n in range(2):
            body = {"prompt": "the and", "max_tokens": 2}
            process.stdin.write(json.dumps({"custom_id": str(n), "url": "/v1/completions", "body": body}) + "\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 60)[0]
            assert json.loads(process.stdout.readline())["custom_id"] == str(n)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert "Fatal" not in process.stderr.read()


# --- the thread -------------------------------------------------------------------------------------------------------


def test_one_thread_from_beginning_to_end():
    """Also where it ends before its time; what is a collection is read here."""
    seen = set()
    word = contextvars.ContextVar("word")
    word.set("known there too")

    def requests():
        try:
            for i in range(100):
                seen.add((threading.current_thread().name, word.get()))
                yield request(i)
        finally:
            seen.add((threading.current_thread().name, word.get()))

    with runner() as r:
        results = r.run(requests())
        next(results)
        results.close()
        assert not readers()
        assert seen == {("llamastate-read", "known there too")}
        results = r.run([request(0)])
        next(results)
        assert not readers()


def test_it_never_runs_beside_who_takes_the_results(monkeypatch):
    """Unless it takes its time: then it must, or nothing would go on."""
    monkeypatch.setattr(reading, "CREDIT", 60.0)  # this machine may have more to do
    taking, together = threading.Event(), []

    def requests():
        for i in range(200):
            together.append(taking.is_set())
            yield request(i, max_tokens=1)
            together.append(taking.is_set())

    with runner() as r:
        for _ in r.run(requests()):
            taking.set()
            time.sleep(0.0005)
            taking.clear()
    assert len(together) == 400
    assert not any(together)


def test_errors_of_a_source():
    def requests(error):
        yield request(0)
        raise error

    with runner() as r:
        for error in (OSError("gone"), KeyboardInterrupt()):
            got = []
            with pytest.raises(type(error)):
                got.extend(x.id for x in r.run(requests(error)))
            assert not readers()
        with pytest.raises(TypeError):
            list(r.run(7))


def test_not_requests():
    """None is one of them, and not the end."""
    items = [request(0), None, 7, Malformed("m", SamplerError("so it is")), request(1)]
    for made in (list, iter, lambda x: (y for y in x)):
        with runner() as r:
            results = list(r.run(made(items)))
        assert sorted(x.id for x in results if x.ok) == ["0", "1"]
        assert [type(x.error) for x in results if x.error] == [InvalidArgumentError, InvalidArgumentError, SamplerError]


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Inline, iter], ids=["here", "in a thread"])
def test_closed_by_what_is_read(wrap):
    r = runner()

    def requests():
        yield request(0)
        r.close()
        yield request(1)

    assert [x.id for x in r.run(wrap(requests()))] in ([], ["0"])
    assert r.closed
    assert r.ctx.closed
    with pytest.raises(ClosedError):
        r.run([])


def test_closed_with_a_run_that_never_began():
    r = runner()
    first = r.run([request(i) for i in range(4)])
    second = r.run([request(9)])
    next(first)
    with pytest.raises(ContextBusyError):
        next(second)
    r.close()
    assert r.ctx.closed
    assert list(first) == []


def test_closed_by_another_thread():
    """While the run stands still because nobody takes its results."""
    r = runner()
    results = r.run([request(i) for i in range(4)])
    next(results)
    thread = threading.Thread(target=r.close)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert r.ctx.closed


# --- asyncio ----------------------------------------------------------------------------------------------------------


def test_cancelled_twice(monkeypatch):
    """In the middle of a step: it ends with CancelledError after it, and what was lost is told."""

    async def main():
        with runner() as r:
            step, begun = r._engine.step, threading.Event()

            def slow():
                begun.set()
                time.sleep(0.3)
                return step()

            monkeypatch.setattr(r._engine, "step", slow)
            got = []

            async def consume():
                async for result in r.arun([request(i, max_tokens=1) for i in range(8)]):
                    got.append(result.id)  # noqa: PERF401  # it is cancelled in the middle

            task = asyncio.create_task(consume())
            await asyncio.to_thread(begun.wait)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.02)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sorted([*got, *(q.id for q in r.unfinished)]) == [str(i) for i in range(8)]
            return [x.id async for x in r.arun([request(0, max_tokens=1)])]

    assert asyncio.run(main()) == ["0"]


def test_an_asynchronous_source_is_closed():
    """In the middle of waiting for its next item, and also if it has items left."""
    closed = []

    async def requests(seconds):
        try:
            for i in range(100):
                yield request(i, max_tokens=1)
                await asyncio.sleep(seconds)
        finally:
            closed.append(seconds)

    async def main():
        with runner() as r:
            for seconds in (3600, 0):
                results = r.arun(requests(seconds))
                await anext(results)
                await asyncio.wait_for(results.aclose(), 30)
                assert closed[-1] == seconds
                assert asyncio.all_tasks() == {asyncio.current_task()}

            async def fails():
                yield request(0, max_tokens=1)
                raise OSError("gone")

            with pytest.raises(OSError, match="gone"):
                [x async for x in r.arun(fails())]

    asyncio.run(main())


def test_delivered_is_not_unfinished():
    async def taken(r):
        results = r.arun([request(i) for i in range(4)])
        first = (await anext(results)).id
        await results.aclose()
        return first

    with runner() as r:
        first = next(iter(r.run([request(i) for i in range(4)]))).id
        gc.collect()
        assert sorted([first, *(q.id for q in r.unfinished)]) == ["0", "1", "2", "3"]
        first = asyncio.run(taken(r))
        assert sorted([first, *(q.id for q in r.unfinished)]) == ["0", "1", "2", "3"]
