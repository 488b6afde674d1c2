"""Bytes of a state move once: nothing is allocated for it, and the buffer is held meanwhile."""

from __future__ import annotations

import re
import resource
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from llamastate import Context, Model
from tests import children, tiny
from tests.conftest import THREADS
from tests.helpers import tokens

BIG = {"n_layer": 8, "n_embd": 128, "n_head": 8, "n_head_kv": 8, "head_dim": 64}


def big_context() -> Context:
    """A state of more than 16 MB, from a model that decodes it in about a second."""
    ctx = Context(Model(tiny.path("dense", **BIG)), n_ctx=1280, n_threads=THREADS)
    ctx.prefill(tokens(1024))
    return ctx


@pytest.fixture(scope="module")
def big() -> Iterator[Context]:
    with big_context() as ctx:
        assert ctx.state_seq_get_size(0) > 16 << 20
        yield ctx


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "whole"])
def test_moving_a_state_allocates_nothing(big: Context, whole: bool):
    out = bytearray(big.state_get_size())
    big.schema  # noqa: B018 (learnt once for a model)
    tracemalloc.start()
    try:
        if whole:
            big.state_get_data_into(out)
            big.state_set_data(out)
        else:
            n = big.state_seq_get_data_into(out, 0)
            with memoryview(out)[:n] as blob:
                big.state_seq_set_data(blob, 0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def peak() -> int:
    """Most memory that this program has had so far, in bytes. What ``getrusage`` says counts from before ``exec``."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes where there is no /proc


def measure_peak() -> None:
    """Run by the test below in a process of its own, because a peak is never forgotten."""
    ctx = big_context()
    ctx.schema  # noqa: B018
    out = np.ones(ctx.state_get_size(), np.uint8)
    before = peak()
    slack = before - psutil.Process().memory_info().rss
    n = ctx.state_get_data_into(out)
    ctx.state_set_data(out[:n])
    n = ctx.state_seq_get_data_into(out, 0)
    ctx.state_seq_set_data(out[:n], 0)
    print(n, slack, peak() - before)


def test_moving_a_state_takes_no_memory():
    """Not Python's allocations only: the process's own, with whatever llama.cpp takes."""
    code = "from tests.test_state_memory import measure_peak; measure_peak()"
    done = children.run(code)
    assert done.returncode == 0, done.stderr
    n, slack, grown = map(int, done.stdout.split())
    assert n > 16 << 20
    assert slack < 1 << 20  # else a copy could hide below an older peak
    assert grown < 1 << 20


def test_buffer_is_held_while_bytes_move(big: Context):
    """Growing a bytearray moves it. While llama.cpp writes into it another thread must not be able to."""
    out = bytearray(big.state_seq_get_size(0))
    refused = threading.Event()
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            try:
                out.append(0)
                out.pop()
            except BufferError:  # noqa: PERF203
                refused.set()

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        for _ in range(500):
            big.state_seq_get_data_into(out, 0)
            if refused.is_set():
                break
    finally:
        stop.set()
        thread.join()
    assert refused.is_set()
    out.append(0)  # and let go afterwards
