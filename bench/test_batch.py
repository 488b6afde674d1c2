"""The batch pipeline beside the loop that one writes by hand, and llama-cpp-python's own completions.

The hand-written loop is tried with several parallelisms and with flash attention on and off, and held against us at its
best; the runner gets the same settings then, and nothing else. (On some processors llama.cpp's flash attention is
several times slower for less than 64 rows than without, which neither side can help.)
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench.conftest import CORES
from bench.rawbatch import Loop
from llamastate import Context, Model
from llamastate.batch import BatchRunner, BatchStats, Request
from llamastate.prefix import PrefixStore
from tests import models, tiny

N_SHARED, N_OWN, N_GENERATE = 782, 18, 32
#: Set LLAMASTATE_BENCH_PROMPTS=512 for the long one.
N_PROMPTS = int(os.environ.get("LLAMASTATE_BENCH_PROMPTS", "64"))
#: Parallelism and flash attention of the hand-written loop.
SWEEP = ((16, "off"), (32, "off"), (64, "off"), (64, "on"))


@pytest.fixture(scope="module")
def text(model):
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return model.tokenize("\n\n".join(topics[name] for name in sorted(topics))[:400_000])


@pytest.fixture(scope="module")
def prompts(text):
    shared = text[:N_SHARED]
    return [np.concatenate([shared, text[2000 + 37 * i : 2000 + 37 * i + N_OWN]]) for i in range(N_PROMPTS)]


def by_hand(model: Model, prompts, n_parallel: int, flash: str, n_shared: int, n_generate: int = N_GENERATE):
    own = max(len(p) for p in prompts) - n_shared + n_generate
    n_ctx = n_shared + own * (n_parallel + 1)
    with Context(
        model, n_ctx=n_ctx, n_seq_max=n_parallel + 1, n_batch=2048, n_ubatch=512, n_threads=CORES, flash_attn=flash
    ) as ctx:
        return Loop(ctx, n_parallel).run(prompts, n_generate, n_shared)


def by_us(model: Model, prompts, n_generate: int = N_GENERATE, **params) -> tuple[float, dict, BatchStats]:
    with BatchRunner(model, n_threads=CORES, **params) as runner:
        started = time.perf_counter()
        results = {
            r.id: r for r in runner.run(Request(str(i), p, max_tokens=n_generate) for i, p in enumerate(prompts))
        }
        seconds = time.perf_counter() - started
        stats = runner.stats
    assert all(r.ok for r in results.values())
    return seconds, results, stats


def rate(results, seconds: float) -> float:
    return sum(r.n_generated for r in results.values()) / seconds


@pytest.fixture(scope="module")
def best(model, prompts):
    """The hand-written loop at its best: tokens a second, parallelism, flash attention, and all that were tried."""
    tried = {}
    for n_parallel, flash in SWEEP:
        seconds, texts = by_hand(model, prompts, n_parallel, flash, N_SHARED)
        tried[n_parallel, flash] = sum(map(len, texts)) / seconds
    (n_parallel, flash), speed = max(tried.items(), key=lambda item: item[1])
    return speed, n_parallel, flash, tried


def test_shared_prefix(claim, model, prompts, best):
    speed, n_parallel, flash, tried = best
    seconds, results, stats = by_us(model, prompts, n_parallel=n_parallel, flash_attn=flash)
    again, *_ = by_hand(model, prompts, n_parallel, flash, N_SHARED)
    speed = max(speed, N_PROMPTS * N_GENERATE / again)
    ours = rate(results, seconds)
    others = ", ".join(f"{n}/{f} {v:.0f}" for (n, f), v in tried.items())
    claim(
        60,
        f"{N_PROMPTS} prompts, {N_SHARED} shared + {N_OWN} own tokens, {N_GENERATE} generated, against a loop by hand",
        f"{ours / speed:.2f} ×: {ours:.0f} against {speed:.0f} tokens/s (sequences/flash attention: {others})",
        ours / speed,
        0.97,
        at_least=True,
    )
    rest = seconds - stats.decode_seconds
    claim(
        61,
        f"everything but llama_decode (planning, forking, sampling, text), {n_parallel} sequences",
        f"{100 * rest / seconds:.2f} % of {seconds:.1f} s; planning {100 * stats.schedule_seconds / seconds:.2f} %",
        100 * rest / seconds,
        2.0,
        unit="%",
    )


def test_against_llama_cpp_python(claim, model, prompts):
    """``create_completion`` one after the other, which keeps the prefix that its prompt shares with the last."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(models.smollm2()), n_ctx=1024, n_threads=CORES, n_threads_batch=CORES, verbose=False)
    try:
        llm.create_completion(prompts[0].tolist(), max_tokens=1, temperature=0)
        started, n = time.perf_counter(), 0
        for prompt in prompts[1:17]:
            made = llm.create_completion(prompt.tolist(), max_tokens=N_GENERATE, temperature=0)
            n += made["usage"]["completion_tokens"]
        theirs = n / (time.perf_counter() - started)
    finally:
        llm.close()
    seconds, results, _ = by_us(model, prompts, n_parallel=32, flash_attn="off")
    ours = rate(results, seconds)
    claim(
        62,
        "the same against llama-cpp-python's create_completion in a loop (16 of them, its shared prefix warm)",
        f"{ours / theirs:.2f} ×: {ours:.0f} against {theirs:.0f} tokens/s",
        ours / theirs,
        1.4,
        at_least=True,
    )


def test_fixed_shapes(claim, model, prompts):
    some = prompts[:32]
    free, results, _ = by_us(model, some, 16, n_parallel=16, flash_attn="off")
    fixed, same, _ = by_us(model, some, 16, n_parallel=16, flash_attn="off", fixed_shapes=True, n_ctx=27 * 1024)
    equal = sum(np.array_equal(results[i].outputs[0].tokens, same[i].outputs[0].tokens) for i in results)
    claim(
        63,
        "fixed_shapes, against not: 32 of those prompts, 16 sequences, 16 tokens generated",
        f"{rate(same, fixed) / rate(results, free):.2f} × as fast; {equal} of 32 texts are equal",
    )


def test_groups(claim, model, text):
    """8 groups of 16 in random order, 400 shared tokens each."""
    llama_cpp = pytest.importorskip("llama_cpp")
    grouped = [
        np.concatenate([text[3000 * g + 1 : 3000 * g + 401], text[3000 * g + 500 + 20 * i : 3000 * g + 516 + 20 * i]])
        for g in range(8)
        for i in range(16)
    ]
    order = np.random.default_rng(0).permutation(len(grouped))
    grouped = [grouped[i] for i in order]
    seconds, _, stats = by_us(model, grouped, 8, n_parallel=32, flash_attn="off")
    possible = sum(len(p) for p in grouped) - 8 * 400 - 128 * 16
    claim(
        64,
        "8 groups of 16 prompts in random order, 400 shared tokens each: prompt tokens not computed, of all possible",
        f"{stats.cached_tokens / possible:.3f}: {stats.cached_tokens:,} of {possible:,}",
        stats.cached_tokens / possible,
        0.98,
        at_least=True,
    )
    llm = llama_cpp.Llama(str(models.smollm2()), n_ctx=1024, n_threads=CORES, n_threads_batch=CORES, verbose=False)
    try:
        llm.create_completion(grouped[0].tolist(), max_tokens=1, temperature=0)
        started = time.perf_counter()
        for prompt in grouped[1:9]:
            llm.create_completion(prompt.tolist(), max_tokens=8, temperature=0)
        theirs = 8 / (time.perf_counter() - started)
    finally:
        llm.close()
    ours = len(grouped) / seconds
    claim(
        65,
        "the same, against llama-cpp-python in a loop (8 of them)",
        f"{ours / theirs:.1f} ×: {ours:.2f} against {theirs:.2f} prompts/s",
        ours / theirs,
        3,
        at_least=True,
    )


def test_nothing_shared(claim, model, text):
    alone = [text[1000 * i + 7 * i : 1000 * i + 7 * i + 200] for i in range(16)]
    tried = {}
    for n_parallel, flash in ((8, "off"), (16, "off"), (16, "on")):
        seconds, texts = by_hand(model, alone, n_parallel, flash, 0)
        tried[n_parallel, flash] = sum(map(len, texts)) / seconds
    (n_parallel, flash), speed = max(tried.items(), key=lambda item: item[1])
    seconds, results, _ = by_us(model, alone, n_parallel=n_parallel, flash_attn=flash)
    ours = rate(results, seconds)
    claim(
        66,
        "16 prompts of 200 tokens that share nothing, against a loop by hand at its best",
        f"{ours / speed:.2f} ×: {ours:.0f} against {speed:.0f} tokens/s",
        ours / speed,
        0.95,
        at_least=True,
    )


def test_the_same_again(claim, model, prompts, folder: Path):
    some = prompts[:16]
    with PrefixStore(folder / "store", block_tokens=16) as store:
        cold, *_ = by_us(model, some, 4, n_parallel=16, flash_attn="off", store=store)
        store.flush()
    with PrefixStore(folder / "store", block_tokens=16) as store:
        warm, _, stats = by_us(model, some, 4, n_parallel=16, flash_attn="off", store=store)
    claim(
        67,
        "16 of those prompts again, a new runner over the store of before, opened anew: prompt tokens not computed",
        f"{stats.hit_rate:.3f} ({stats.stored_tokens:,} read from the store, shared by all); {cold:.1f} s before, "
        f"{warm:.1f} s now",
        stats.hit_rate,
        0.95,
        at_least=True,
    )


def test_memory_is_flat(claim):
    """100,000 requests through a tiny model."""
    process = psutil.Process()
    sizes = []
    with Model(tiny.path("dense")) as small, BatchRunner(small, n_parallel=64, n_ctx=1024, n_threads=1) as runner:
        requests = (Request(str(i), [i % 251, i // 251 % 251, 3], max_tokens=2) for i in range(100_000))
        for n, _ in enumerate(runner.run(requests), 1):
            if n % 10_000 == 0:
                gc.collect()
                sizes.append(process.memory_info().rss)
    grown = (sizes[-1] - sizes[0]) / 1e6
    claim(
        68,
        "100,000 queued requests: memory after all of them against after the first 10,000",
        f"{grown:+.1f} MB of {sizes[-1] / 1e6:.0f} MB",
        grown,
        5,
        unit="MB",
    )
