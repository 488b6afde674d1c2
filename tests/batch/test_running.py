"""The runner's life: made, stopped, given up, closed, in threads and under asyncio."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import warnings

import pytest

from llamastate.batch import BatchRunner, Request
from llamastate.errors import (
    ClosedError,
    ContextBusyError,
    ContextCreateError,
    InvalidArgumentError,
    ModelLoadError,
)
from tests.batch.runners import one, runner
from tests.conftest import THREADS
from tests.helpers import model, tokens


@pytest.fixture(scope="module")
def chat():
    return model("chat")


def endless():
    i = 0
    while True:
        yield Request(str(i), tokens(12, i), max_tokens=20)
        i += 1


def test_stop_in_the_middle():
    with runner("dense") as r:
        done = []
        for result in r.run(endless()):
            done.append(result.id)
            if len(done) == 10:
                r.stop()
        left = [q.id for q in r.unfinished]
        assert left
        assert not set(left) & set(done)
        n = len(left) + len(done)
        assert sorted(map(int, [*left, *done])) == list(range(n))  # nothing lost, nothing twice
        again = {result.id for result in r.run(r.unfinished)}
        assert again == set(left)
        assert r.unfinished == ()


def test_stop_from_a_thread():
    with runner("dense") as r:
        timer = threading.Timer(0.2, r.stop)
        timer.start()
        n = sum(1 for _ in r.run(endless()))
        timer.join()
        assert n > 0


def test_given_up():
    with runner("dense") as r:
        results = r.run(Request(str(i), tokens(12, i), max_tokens=3) for i in range(12))
        first = next(results).id
        results.close()
        left = {q.id for q in r.unfinished}
        assert left
        assert left <= {str(i) for i in range(12)}
        assert first not in left
        assert r.stats.running == r.stats.waiting == 0
        assert len(list(r.run([Request("x", tokens(5), max_tokens=2)]))) == 1


def test_one_run_at_a_time():
    with runner("dense") as r:
        first = r.run(endless())
        next(first)
        with pytest.raises(ContextBusyError):
            next(r.run([]))
        first.close()
        assert list(r.run([])) == []


def test_of_a_path(chat):
    """The model is its own, and closed with it; also if nothing comes of it."""
    r = BatchRunner(chat.path, n_parallel=2, n_ctx=256, n_threads=THREADS)
    with r:
        assert [x.ok for x in r.run([Request("a", "the", max_tokens=1)])] == [True]
    assert r.model.closed
    with pytest.raises(ModelLoadError):
        BatchRunner("/nowhere/model.gguf")
    for wrong in (None, 7, r):
        with pytest.raises(InvalidArgumentError, match=f"model is {type(wrong).__name__}: a Model, or the path of one"):
            BatchRunner(wrong)


def test_the_default_of_cells(monkeypatch):
    """Of the model and ``n_parallel`` alone, whatever memory there is; what cannot be is said."""
    for n_parallel, cells in ((2, 2048), (8, 8 * 512)):
        for memory in (1 << 40, 30 << 20):
            monkeypatch.setattr("llamastate.probe.available_memory", lambda memory=memory: memory)
            with runner("dense", n_ctx=0, n_parallel=n_parallel) as r:
                assert r.ctx.n_ctx == max(cells, min(r.model.n_ctx_train, 8192))
    monkeypatch.setattr("llamastate.probe.available_memory", lambda: 1000)
    with pytest.raises(ContextCreateError, match=r"n_ctx is \d+ if it is not given") as caught:
        runner("dense", n_ctx=0)
    assert caught.value.reason == "memory"


def test_closed():
    r = runner("dense")
    r.close()
    r.close()
    assert r.closed
    with pytest.raises(ClosedError):
        next(r.run([Request("a", [1])]))


def test_closed_in_the_middle():
    """With an iterator that nobody has given up: it ends, nothing hangs."""
    with runner("dense") as r:
        results = r.run(endless())
        next(results)
    assert r.closed
    assert list(results) == []


@pytest.mark.parametrize(
    "params",
    [
        {"n_parallel": 0},
        {"n_parallel": 1000},
        {"n_parallel": 1.5},
        {"n_spare": -1},
        {"n_ctx": -1},
        {"window": 0},
        {"patience": -1},
        {"reserve": 0},
        {"preempt_bytes": -1},
        {"n_batch": 0},
    ],
)
def test_bad_parameters(params):
    with pytest.raises(InvalidArgumentError):
        runner("dense", **params)


def test_two_threads_two_runners():
    found = {}

    def work(name):
        with runner("dense") as r:
            found[name] = [x.outputs[0].tokens.tolist() for x in r.run([Request("a", tokens(30), max_tokens=9)])]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]


def test_asyncio():
    async def requests():
        for i in range(9):
            await asyncio.sleep(0)
            yield Request(str(i), tokens(10, i), max_tokens=3)

    async def main():
        with runner("dense") as r:
            from_async = [x.id async for x in r.arun(requests())]
            from_list = [x.id async for x in r.arun([Request("a", [1, 2])])]
            ticks = 0

            async def tick():
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            ticker = asyncio.create_task(tick())

            async def consume():
                async for _ in r.arun(endless()):
                    pass

            task = asyncio.create_task(consume())
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            ticker.cancel()
            assert ticks > 10
            assert r.unfinished

            async def never():
                yield Request("a", [1, 2], max_tokens=2)
                await asyncio.sleep(3600)

            results = r.arun(never())
            assert (await anext(results)).id == "a"  # not put off until there are more
            with pytest.raises(asyncio.TimeoutError):  # whoever waits for requests can be cancelled too
                await asyncio.wait_for(anext(results), 0.5)
            return from_async, from_list

    from_async, from_list = asyncio.run(main())
    assert sorted(from_async) == [str(i) for i in range(9)]
    assert from_list == ["a"]


def test_figures():
    with runner("dense") as r:
        shared = tokens(100)
        requests = [Request(str(i), [*shared.tolist(), i], max_tokens=3) for i in range(8)]
        results = list(r.run(requests))
        s = r.stats
    assert (s.done, s.failed, s.running, s.waiting, s.parked) == (8, 0, 0, 0, 0)
    assert s.prompt_tokens == 8 * 101
    assert s.cached_tokens == 7 * 100 == sum(x.n_cached for x in results)
    assert s.generated_tokens == 24
    assert s.decoded_tokens == 100 + 8 + 8 * 2
    assert s.forks == 7
    assert s.hit_rate == s.cached_tokens / s.prompt_tokens
    assert json.dumps(s.decodes)
    assert min(s.decode_seconds, s.sample_seconds, s.schedule_seconds, s.prepare_seconds) > 0


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(Request("a", tokens(5), max_tokens=2), m="dense")
        gc.collect()
