"""Two ways of doing one thing, timed turn by turn."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Pairs", "no_gc", "pairs", "seconds", "settle", "stopwatch"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Seconds of each round, ours and the other's: float64[rounds]."""

    ours: npt.NDArray[np.float64]
    other: npt.NDArray[np.float64]

    @property
    def our_median(self) -> float:
        return float(np.median(self.ours))

    @property
    def other_median(self) -> float:
        return float(np.median(self.other))

    @property
    def ratio(self) -> float:
        """How many times the other's time ours is: the quotient of the medians."""
        return self.our_median / self.other_median

    @property
    def pair_ratio(self) -> float:
        """The same as the median of the rounds' own quotients; what drifts slowly cancels out in it."""
        return float(np.median(self.ours / self.other))

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the rounds' quotients."""
        low, high = np.percentile(self.ours / self.other, [25, 75])
        return float(low), float(high)


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """Collect now, and not again until the end of the block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


#: Seconds after which a copy of some 50 MB has reached its own pace, when something else used the caches before.
SETTLE = 0.15


def settle(function: Callable[[], object]) -> None:
    """Call a function, untimed, until it finds the machine as it leaves it."""
    end = time.perf_counter() + SETTLE
    while time.perf_counter() < end:
        function()


def stopwatch(function: Callable[[], object], *, settled: bool = False) -> Callable[[], float]:
    """Turn a function into one that returns the seconds it took; with ``settled``, after untimed calls."""

    def timed() -> float:
        if settled:
            settle(function)
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return timed


def seconds(function: Callable[[], object], rounds: int, *, warmup: int = 1) -> npt.NDArray[np.float64]:
    """Seconds of each of ``rounds`` calls."""
    timed = stopwatch(function)
    with no_gc():
        return np.array([timed() for _ in range(warmup + rounds)][warmup:])


def pairs(
    benchmark: Any,
    ours: Callable[[], object],
    other: Callable[[], float],
    *,
    rounds: int,
    warmup: int = 3,
    begin: Callable[[], object] | None = None,
    end: Callable[[], object] | None = None,
) -> Pairs:
    """Time ``ours`` with pytest-benchmark and ``other`` beside it.

    Parameters
    ----------
    benchmark : fixture
    ours : callable
    other : callable
        Returns its own seconds (see :func:`stopwatch`). Runs before ours in even rounds and after it in odd ones, so
        that neither always finds the caches as the other left them.
    rounds, warmup : int
        Rounds that count, and rounds before them that do not.
    begin, end : callable, optional
        Called right before and right after ours, not timed.
    """
    times: list[float] = []
    ours_first = False

    def before() -> None:
        if not ours_first:
            times.append(other())
        if begin is not None:
            begin()

    def after() -> None:
        nonlocal ours_first
        if end is not None:
            end()
        if ours_first:
            times.append(other())
        ours_first = not ours_first

    with no_gc():
        benchmark.pedantic(ours, setup=before, teardown=after, rounds=rounds, warmup_rounds=warmup)
    return Pairs(np.array(benchmark.stats.stats.data), np.array(times[warmup:]))
