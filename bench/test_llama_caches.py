"""Against ``LlamaRAMCache`` and ``LlamaDiskCache``: prompts in groups that begin alike, through ``create_completion``.

What counts as time in the cache is everything that a completion does for it: looking up, loading, saving and storing,
and for ours the wait for the disk at the end. The prompts come group by group in turn, so that what a ``Llama`` still
holds is never what the next one begins with.
"""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.conftest import CORES
from bench.timing import no_gc, seconds
from llamastate.interop.llama_cpp import LlamaStateCache, accelerate
from tests import models

llama_cpp = pytest.importorskip("llama_cpp")
llama_cache = pytest.importorskip("llama_cpp.llama_cache")

GROUPS, EACH = 10, 5
#: Not a whole number of blocks: the rest is evaluated again with ours only.
SHARED, OWN, GENERATED = 300, 32, 2
ROOM = 32 << 30


class Stopwatch:
    """Seconds in the methods that it was put around; a method that calls another counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - start

    def around(self, cls: type, *names: str) -> type:
        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(self_: Any, *args: Any) -> Any:
                self = self_  # noqa: F841  # who looks for a caller passes methods of the same object over
                with watch.running():
                    return function(self_, *args)

            return call

        watch = self
        return type(cls.__name__, (cls,), {name: timed(getattr(cls, name)) for name in names})


@pytest.fixture(scope="module")
def prompts(tokens) -> list[list[int]]:
    ids = tokens.tolist()
    begin = [ids[i * 100 : i * 100 + SHARED] for i in range(GROUPS)]
    own = np.random.default_rng(5).integers(1000, 40000, (EACH, GROUPS, OWN)).tolist()
    return [begin[g] + own[e][g] for e in range(EACH) for g in range(GROUPS)]


def complete(prompts: list[list[int]], cache: Any, watch: Stopwatch) -> float:
    """Complete them all with a new ``Llama``; seconds in all. Its own part of the work is timed as well."""
    timed = watch.around(llama_cpp.Llama, "save_state", "load_state")
    llm = timed(str(models.smollm2()), n_ctx=1024, n_threads=CORES, n_threads_batch=CORES, verbose=False)
    llm.set_cache(cache)
    try:
        with no_gc(), contextlib.redirect_stderr(io.StringIO()):  # LlamaDiskCache tells what it does
            start = time.perf_counter()
            for prompt in prompts:
                llm.create_completion(prompt, max_tokens=GENERATED, temperature=0.0)
            return time.perf_counter() - start
    finally:
        llm.close()


def nbytes(state: Any) -> int:
    return int(len(state.llama_state) + state.scores.nbytes + state.input_ids.nbytes)


def with_ram(prompts: list[list[int]]) -> dict[str, float]:
    watch = Stopwatch()
    cache = watch.around(llama_cache.LlamaRAMCache, "__getitem__", "__setitem__")(capacity_bytes=ROOM)
    seconds = complete(prompts, cache, watch)
    states = cache.cache_state.values()
    assert len(states) == len(prompts)
    return {"cache": watch.seconds, "all": seconds, "bytes": sum(map(nbytes, states)), "states": cache.cache_size}


def with_disk(prompts: list[list[int]], folder: Path) -> dict[str, float]:
    watch = Stopwatch()
    made = watch.around(llama_cache.LlamaDiskCache, "__getitem__", "__setitem__")
    cache = made(str(folder), capacity_bytes=ROOM)
    try:
        seconds = complete(prompts, cache, watch)
        assert len(cache.cache) == GROUPS  # it takes out what it reads
        return {"cache": watch.seconds, "all": seconds, "bytes": cache.cache_size}
    finally:
        cache.cache.close()


def with_ours(prompts: list[list[int]], folder: Path | None) -> dict[str, float]:
    watch = Stopwatch()
    made = watch.around(LlamaStateCache, "__getitem__", "__setitem__", "_load")
    with made(folder, capacity_bytes=ROOM, ram_bytes=4 << 30) as cache:
        seconds = complete(prompts, cache, watch)
        flushing = watch.seconds
        with watch.running():
            cache.flush()
        stats = cache.stats()
        assert (stats.hits, stats.dropped) == (len(prompts) - GROUPS, 0)
        return {
            "cache": watch.seconds,
            "flush": watch.seconds - flushing,
            "all": seconds,
            "bytes": cache.cache_size,
            "hit_rate": stats.hit_rate,
        }


def test_grouped_prompts(claim, prompts, folder):
    disk = with_disk(prompts, folder / "theirs")
    ram = with_ram(prompts)
    ours = with_ours(prompts, folder / "ours")
    memory = with_ours(prompts, None)
    what = f"{len(prompts)} prompts in {GROUPS} groups, {SHARED} tokens in common"
    claim(
        90,
        f"{what}: time in LlamaStateCache on disk against LlamaDiskCache",
        f"{disk['cache'] / ours['cache']:.0f} × less: {1e3 * ours['cache'] / len(prompts):.1f} against "
        f"{1e3 * disk['cache'] / len(prompts):.0f} ms a completion (waiting for the disk at the end "
        f"{1e3 * ours['flush']:.0f} ms of all); all in all {ours['all']:.1f} against {disk['all']:.1f} s",
        disk["cache"] / ours["cache"],
        10,
        at_least=True,
    )
    claim(
        91,
        "the same, in memory against LlamaRAMCache",
        f"{ram['cache'] / memory['cache']:.1f} × less: {1e3 * memory['cache'] / len(prompts):.1f} against "
        f"{1e3 * ram['cache'] / len(prompts):.1f} ms a completion (on disk {1e3 * ours['cache'] / len(prompts):.1f}); "
        f"all in all {memory['all']:.1f} against {ram['all']:.1f} s",
        ram["cache"] / memory["cache"],
        2,
        at_least=True,
    )
    claim(
        92,
        "bytes held after them, against LlamaRAMCache",
        f"{ram['bytes'] / memory['bytes']:.1f} × fewer: {memory['bytes'] / 1e6:.0f} against {ram['bytes'] / 1e6:.0f} "
        f"MB, of which {ram['states'] / 1e6:.0f} are states and the rest scores",
        ram["bytes"] / memory["bytes"],
        5,
        at_least=True,
    )
    claim(
        93,
        "bytes held after them, against LlamaDiskCache",
        f"{disk['bytes'] / ours['bytes']:.1f} × fewer: {ours['bytes'] / 1e6:.0f} against {disk['bytes'] / 1e6:.0f} MB "
        f"for {GROUPS} of {len(prompts)} states, since it takes out what it reads",
        disk["bytes"] / ours["bytes"],
        5,
        at_least=True,
    )


def test_accelerated(claim, tokens):
    """``save_state`` and ``load_state`` of one ``Llama``, its own and accelerated."""
    llm = llama_cpp.Llama(str(models.smollm2()), n_ctx=2048, n_threads=CORES, n_threads_batch=CORES, verbose=False)
    llm.eval(tokens[:1024].tolist())
    state = llm.save_state()
    own = [seconds(llm.save_state, 9), seconds(lambda: llm.load_state(state), 9)]
    with accelerate(llm):
        state = llm.save_state()
        ours = [seconds(llm.save_state, 9), seconds(lambda: llm.load_state(state), 9)]
    llm.close()
    for row, name, theirs, mine in zip((94, 95), ("save_state", "load_state"), own, ours, strict=True):
        theirs, mine = 1e3 * float(np.median(theirs)), 1e3 * float(np.median(mine))
        claim(
            row,
            f"Llama.{name} of 1,024 tokens, accelerated",
            f"{theirs / mine:.1f} × faster: {mine:.2f} against {theirs:.1f} ms",
        )
