"""A Python thread goes on counting while another computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from bench.conftest import CORES
from bench.timing import pairs, seconds, stopwatch

COUNT = 5_000_000


def count() -> int:
    n = 0
    while n < COUNT:
        n += 1
    return n


class Busy:
    """Does one thing over and over in a thread of its own while the block runs."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._go, self._stop, self._idle = threading.Event(), threading.Event(), threading.Event()
        self.calls, self.seconds = 0, 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._idle.set()
            self._go.wait()
            if self._stop.is_set():
                return
            self._idle.clear()
            start = time.perf_counter()
            while self._go.is_set():
                self._work()
                self.calls += 1
            self.seconds += time.perf_counter() - start

    def resume(self) -> None:
        self._go.set()
        while self._idle.is_set():
            time.sleep(0.001)

    def pause(self) -> None:
        self._go.clear()
        self._idle.wait()

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._go.set()
        self._thread.join()


@pytest.fixture(scope="module")
def one_thread(new_context, tokens):
    """A context that computes with one thread, so that one of two cores is left to count on."""
    with new_context(n_threads=1) as context:
        context.prefill(tokens[:512])
        yield context


def test_counting_while_decoding(benchmark, claim, one_thread, tokens):
    token = tokens[512:513]

    def step() -> None:
        one_thread.decode(token)
        one_thread.seq_rm(0, 512, -1)

    alone = float(np.median(seconds(step, 40)))
    with Busy(step) as busy:
        # Ours is counting beside a thread that decodes, the other side is counting with nothing beside it.
        result = pairs(benchmark, count, stopwatch(count), rounds=15, warmup=1, begin=busy.resume, end=busy.pause)
    speed = 100 / result.ratio
    claim(
        10,
        f"a Python thread counting while another decodes with n_threads=1 (of {CORES} cores), against its speed alone",
        f"{speed:.1f} % (pairs {100 / result.pair_ratio:.1f}); "
        f"the decoding thread keeps {100 * alone * busy.calls / busy.seconds:.0f} % of its own",
        speed if CORES > 1 else None,
        80,
        at_least=True,
        unit="%",
    )
