"""Threads in one context take turns, or are told that it is busy."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from llamastate import ClosedError, Context, ContextBusyError, CorruptStateError, LlamaStateError, Model, Sampler
from tests import children, tiny
from tests.conftest import THREADS
from tests.helpers import assert_same_logits, context, follow, tokens

#: A batch of this model computes long enough for another thread to meet it.
SLOW = {"n_layer": 8, "n_embd": 128, "n_head": 8, "n_head_kv": 8, "head_dim": 64}


@pytest.fixture(scope="module")
def slow() -> Iterator[Model]:
    with Model(tiny.path("dense", **SLOW)) as model:
        yield model


class Holder:
    """Holds a context's lock in a thread of its own, as an operation would that takes forever."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._ctx._handle:
            self._inside.set()
            self._leave.wait(60)

    def __enter__(self) -> Holder:
        self._thread.start()
        assert self._inside.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave.set()
        self._thread.join()


CALLS: dict[str, Callable[[Context], Any]] = {
    "decode": lambda ctx: ctx.decode([1]),
    "logits": lambda ctx: ctx.logits(),
    "view": lambda ctx: ctx.logits(copy=False),
    "sample": lambda ctx: Sampler(ctx.model).sample(ctx),
    "state_get_data": lambda ctx: ctx.state_get_data(),
    "state_set_data": lambda ctx: ctx.state_set_data(bytes(3)),
    "state_seq_get_size": lambda ctx: ctx.state_seq_get_size(0),
    "state_seq_get_data": lambda ctx: ctx.state_seq_get_data(0),
    "seq_rm": lambda ctx: ctx.seq_rm(0),
    "seq_pos_max": lambda ctx: ctx.seq_pos_max(0),
    "clear": lambda ctx: ctx.clear(),
    "n_threads": lambda ctx: ctx.n_threads,
    "close": lambda ctx: ctx.close(),
}


# close() always waits: an end that can be refused would leave a with block in the middle
@pytest.mark.parametrize("call", [name for name in CALLS if name != "close"])
def test_second_thread_is_told(call: str):
    with context("dense", on_busy="raise") as ctx:
        ctx.decode(tokens(10))
        with Holder(ctx), pytest.raises(ContextBusyError) as caught:
            CALLS[call](ctx)
        assert caught.value.operation
        assert ctx.seq_pos_max(0) == 9
        ctx.logits()


@pytest.mark.parametrize(("call", "on_busy"), [*((name, "wait") for name in CALLS), ("close", "raise")])
def test_second_thread_waits(call: str, on_busy: str):
    with context("dense", on_busy=on_busy) as ctx, ThreadPoolExecutor(1) as pool:
        ctx.decode(tokens(10))
        with Holder(ctx):
            waiting = pool.submit(CALLS[call], ctx)
            with pytest.raises(futures.TimeoutError):
                waiting.result(timeout=0.15)
        error = waiting.exception(timeout=60)
        assert isinstance(error, CorruptStateError if call == "state_set_data" else type(None))


def test_busy_while_it_computes(slow: Model):
    with Context(slow, n_ctx=1024, n_threads=THREADS, on_busy="raise") as ctx:
        thread = threading.Thread(target=ctx.prefill, args=(tokens(1000),))
        thread.start()
        refused = 0
        while thread.is_alive():
            try:
                ctx.seq_pos_max(0)
            except ContextBusyError:  # noqa: PERF203
                refused += 1
        thread.join()
        assert refused
        assert ctx.seq_pos_max(0) == 999


def test_a_thread_may_come_in_twice():
    with context("dense", on_busy="raise") as ctx, ctx._handle, ctx._handle:
        ctx.prefill(tokens(20), chunk=5)
        assert ctx.seq_pos_max(0) == 19


def test_threads_in_turns_mix_nothing_up():
    """Four threads, a sequence each, one context: every one reads what it would have read alone."""

    def talk(ctx: Context, seq: int) -> np.ndarray[Any, Any]:
        rows = []
        for token in tokens(40, seed=seq):
            with ctx._handle:  # what belongs together: another thread's decode would replace the logits
                ctx.decode([token], seq_id=seq)
                rows.append(ctx.logits())
            ctx.state_seq_set_data(ctx.state_seq_get_data(seq), seq)
        return np.array(rows)

    with context("iswa", n_seq_max=4) as ctx, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seq: talk(ctx, seq), range(4)))
    for seq in range(4):
        with context("iswa") as alone:
            assert_same_logits(found[seq], talk(alone, 0) if seq == 0 else _alone(alone, seq))


def _alone(ctx: Context, seed: int) -> np.ndarray[Any, Any]:
    rows = []
    for token in tokens(40, seed=seed):
        ctx.decode([token])
        rows.append(ctx.logits())
    return np.array(rows)


def test_contexts_in_many_threads():
    """A context each over the same weights, made and thrown away there."""

    def work(seed: int) -> np.ndarray[Any, Any]:
        with context("jamba") as ctx:
            ctx.decode(tokens(30, seed=seed))
            return follow(ctx, 7, 8)[1]

    expected = [work(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(work, range(16))), expected)


def test_models_loaded_in_many_threads():
    paths = [tiny.path(name) for name in tiny.MODELS] * 3

    def load(path: Any) -> str:
        with Model(path) as loaded:
            return loaded.memory_kind

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load, paths)) == [tiny.MODELS[name].kind for name in tiny.MODELS] * 3


# --- the GIL ----------------------------------------------------------------------------------------------------------

BUFFER = bytearray(8 << 20)
TEXT = "the of and to in " * 20000
UNLOCKED: dict[str, Callable[[Context], Any]] = {
    "decode": lambda ctx: ctx.decode([1]),
    "state_get_data_into": lambda ctx: ctx.state_get_data_into(BUFFER),
    "state_set_data": lambda ctx: ctx.state_set_data(memoryview(BUFFER)[: ctx.state_get_size()]),
    "state_seq_get_data_into": lambda ctx: ctx.state_seq_get_data_into(BUFFER, 0),
    "clear": lambda ctx: ctx.clear(),
    "Context": lambda ctx: Context(ctx.model, n_ctx=256, n_threads=1).close(),
    "Model": lambda ctx: Model(ctx.model.path).close(),
    "tokenize": lambda ctx: ctx.model.tokenize(TEXT),
}


@pytest.mark.parametrize("call", UNLOCKED)
def test_other_threads_run_meanwhile(call: str):
    """Nobody is ever made to hand over the GIL here, so the other thread runs if and only if the call lets it go."""
    ran = False
    go = threading.Lock()

    def count() -> None:
        nonlocal ran
        with go:
            ran = True

    with Model(tiny.path("chat", **SLOW)) as large, Context(large, n_ctx=768, n_threads=THREADS) as ctx:
        ctx.decode(tokens(300))
        ctx.schema  # noqa: B018 (what is done once only has been done)
        ctx.state_get_data_into(BUFFER)
        interval = sys.getswitchinterval()
        thread = threading.Thread(target=count)
        go.acquire()
        thread.start()
        try:
            sys.setswitchinterval(1000)
            go.release()
            before = ran
            for _ in range(300):  # it may be over before the other has woken up
                UNLOCKED[call](ctx)
                if ran:
                    break
        finally:
            after = ran
            sys.setswitchinterval(interval)
            thread.join()
    assert (before, after) == (False, True)


# --- closing ----------------------------------------------------------------------------------------------------------


def test_closing_waits_for_the_computation(slow: Model):
    """The other thread's batch is computed to its end; its next call finds the context closed."""
    for _ in range(3):
        ctx = Context(slow, n_ctx=1024, n_threads=THREADS)
        started = threading.Event()
        outcome: list[Any] = []

        def work(ctx: Context = ctx, started: threading.Event = started, outcome: list[Any] = outcome) -> None:
            try:
                while True:
                    started.set()
                    ctx.decode(tokens(64))
                    outcome.append(len(outcome))
            except LlamaStateError as error:
                outcome.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        ctx.close()
        thread.join()
        assert isinstance(outcome[-1], ClosedError)
        assert outcome[:-1] == list(range(len(outcome) - 1))


def test_ctrl_c_while_waiting():
    """Whoever waits for its turn can still be interrupted."""
    done = children.run(
        """
import os, signal, threading, time
# a shell's background jobs inherit that it is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.helpers import context
from tests.test_locks import Holder
ctx = context("dense")
with Holder(ctx):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        ctx.decode([1])
    except KeyboardInterrupt:
        print("interrupted")
print(ctx.decode([1]))
"""
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["interrupted", "1"], "")


def test_several_calls_are_one_turn():
    """Nobody comes between the calls inside, of which there may be any; afterwards it is everybody's again."""
    expected = {}
    for seq_id, text in ((0, tokens(20)), (1, tokens(9, seed=3))):
        with context("dense", n_seq_max=2) as alone:
            alone.decode(text, seq_id=seq_id)
            expected[seq_id] = alone.logits()
    with context("dense", n_seq_max=2) as ctx, ThreadPoolExecutor(1) as other:
        with ctx.lock() as same, ctx.lock():
            assert same is ctx
            waits = other.submit(lambda: (ctx.decode(tokens(9, seed=3), seq_id=1), ctx.logits()))
            ctx.decode(tokens(20))
            with pytest.raises(futures.TimeoutError):
                waits.result(0.1)
            np.testing.assert_array_equal(ctx.logits(), expected[0])
        assert_same_logits(waits.result(60)[1], expected[1])
    with pytest.raises(ClosedError), ctx.lock():
        pass


def test_a_turn_of_several_calls_can_be_refused():
    with context("dense", on_busy="raise") as ctx, Holder(ctx), pytest.raises(ContextBusyError), ctx.lock():
        pass


def test_closing_inside_a_turn():
    with context("dense") as ctx:
        with ctx.lock():
            ctx.close()
        assert ctx.closed
