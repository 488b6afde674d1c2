"""The batch pipeline beside the loop that one writes by hand, llama-cpp-python's completions, and servers that batch.

The hand-written loop is tried with several parallelisms and with flash attention on and off, and held against us at its
best; the runner gets the same settings then, and nothing else. (llama.cpp's flash attention for processors takes the
rows of a batch one at a time unless there are many: where all read the same prefix, that is about half as fast as
without.)

The servers run in processes, and environments, of their own: ``make bench-peers`` makes them, with the ``server.py`` of
llama-cpp-python's examples. ``LLAMASTATE_XLLAMACPP_PYTHON``, ``LLAMASTATE_LLAMA_SERVER_PYTHON`` and
``LLAMASTATE_LLAMA_SERVER`` (the file) name others.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from bench.conftest import CORES
from bench.peer import ROOT, Peer, python_of
from bench.rawbatch import Loop
from llamastate import Context, Model
from llamastate.batch import BatchRunner, BatchStats, Output, Request, Result, run_batch
from llamastate.prefix import PrefixStore
from tests import models, tiny

N_SHARED, N_OWN, N_GENERATE = 782, 18, 32
#: Set LLAMASTATE_BENCH_PROMPTS=512 for the long one. The sweep and the servers have 64 in any case.
N_PROMPTS = int(os.environ.get("LLAMASTATE_BENCH_PROMPTS", "64"))
N_TRIED = 64
#: Parallelism and flash attention of the hand-written loop; for the long one those that are the best of the others.
SWEEP = ((32, "off"), (16, "off"), (64, "off"), (16, "on"), (32, "on"), (64, "on"))[: 2 if N_PROMPTS > N_TRIED else 6]

Prompts = Sequence[npt.NDArray[np.int32]]


@pytest.fixture(scope="module")
def text(model):
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return model.tokenize("\n\n".join(topics[name] for name in sorted(topics))[:400_000])


@pytest.fixture(scope="module")
def prompts(text):
    shared = text[:N_SHARED]
    return [np.concatenate([shared, text[2000 + 37 * i : 2000 + 37 * i + N_OWN]]) for i in range(max(N_PROMPTS, 64))]


def by_hand(model: Model, prompts, n_parallel: int, flash: str, n_shared: int, n_generate: int = N_GENERATE):
    own = max(len(p) for p in prompts) - n_shared + n_generate
    n_ctx = n_shared + own * (n_parallel + 1)
    with Context(
        model, n_ctx=n_ctx, n_seq_max=n_parallel + 1, n_batch=2048, n_ubatch=512, n_threads=CORES, flash_attn=flash
    ) as ctx:
        return Loop(ctx, n_parallel).run(prompts, n_generate, n_shared)


def by_us(
    model: Model, prompts: Prompts, n_generate: int = N_GENERATE, **params: object
) -> tuple[float, dict[str, Result], BatchStats, list[float]]:
    """Seconds, results by number, figures, and the process's megabytes after every 32 results."""
    process = psutil.Process()
    results: dict[str, Result] = {}
    sizes = []
    with BatchRunner(model, n_threads=CORES, **params) as runner:  # type: ignore[arg-type]
        started = time.perf_counter()
        for result in runner.run(Request(str(i), p, max_tokens=n_generate) for i, p in enumerate(prompts)):
            results[result.id] = result
            if len(results) % 32 == 0:
                sizes.append(process.memory_info().rss / 1e6)
        seconds = time.perf_counter() - started
        stats = runner.stats
    assert all(r.ok for r in results.values())
    return seconds, results, stats, sizes


def rate(results, seconds: float) -> float:
    return sum(r.n_generated for r in results.values()) / seconds


def on(flash: object) -> str:
    return "on" if flash else "off"


@pytest.fixture(scope="module")
def best(model, prompts):
    """The hand-written loop at its best: parallelism, flash attention, tokens a second of all that were tried."""
    tried = {}
    for n_parallel, flash in SWEEP:
        seconds, texts = by_hand(model, prompts[:N_TRIED], n_parallel, flash, N_SHARED)
        tried[n_parallel, flash] = sum(map(len, texts)) / seconds
    return *max(tried, key=lambda setting: tried[setting]), tried


@pytest.fixture
def ours(model, prompts):
    """We ourselves over the prompts that the servers get: tokens a second, just before, the better of two settings."""
    tried = [by_us(model, prompts[:N_TRIED], n_parallel=n, flash_attn="off") for n in (16, 32)]
    return max(rate(results, seconds) for seconds, results, *_ in tried)


def test_shared_prefix(claim, model, prompts, best):
    n_parallel, flash, tried = best
    # in turns, for the machine has better moments and worse ones; long runs have both
    pairs = []
    for _ in range(3 if N_PROMPTS == N_TRIED else 1):
        seconds, results, _, sizes = by_us(model, prompts[:N_PROMPTS], n_parallel=n_parallel, flash_attn=flash)
        theirs, texts = by_hand(model, prompts[:N_PROMPTS], n_parallel, flash, N_SHARED)
        mine, speed = rate(results, seconds), sum(map(len, texts)) / theirs
        pairs.append((mine / speed, mine, speed))
    ratio, mine, speed = sorted(pairs)[len(pairs) // 2]
    others = ", ".join(f"{n}/{f} {v:.0f}" for (n, f), v in tried.items())
    each = "" if len(pairs) == 1 else f" ({', '.join(f'{r:.2f}' for r, *_ in pairs)})"
    what = f"{N_PROMPTS} prompts, {N_SHARED} shared + {N_OWN} own tokens, {N_GENERATE} generated"
    claim(
        60,
        f"{what}, against a loop by hand",
        f"{ratio:.2f} ×{each}: {mine:.0f} against {speed:.0f} tokens/s (sequences/flash attention: {others})",
        ratio,
        0.97,
        at_least=True,
    )
    if N_PROMPTS >= 256:
        grown = sizes[-1] - sizes[1]
        claim(
            78,
            f"{what}: memory after all of them against after the first 64",
            f"{grown:+.1f} MB of {sizes[-1]:.0f} MB",
            grown,
            5,
            unit="MB",
        )


def test_nothing_said(claim, model, prompts, best, text, folder: Path):
    """``run-batch`` with no flag at all, from file to file, where prompts share and where they do not."""
    speeds = []
    alone = [text[1000 * i + 7 * i : 1000 * i + 7 * i + 200] for i in range(32)]
    for name, asked in (("shared", prompts[:N_TRIED]), ("alone", alone)):
        rows = [
            {"custom_id": str(i), "url": "/v1/completions", "method": "POST"}
            | {"body": {"prompt": prompt.tolist(), "max_tokens": N_GENERATE, "temperature": 0, "ignore_eos": True}}
            for i, prompt in enumerate(asked)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        started = time.perf_counter()
        summary = run_batch(folder / name, folder / f"{name}.out", model=model)
        speeds.append(summary.generated_tokens / (time.perf_counter() - started))
        assert summary.completed == len(asked)
    hand = []
    for n_parallel, flash in ((8, "on"), (16, "on"), (8, "off")):
        seconds, texts = by_hand(model, alone, n_parallel, flash, 0)
        hand.append(sum(map(len, texts)) / seconds)
    shared = max(best[2].values())
    claim(
        69,
        f"run-batch with no flags, from file to file: {N_TRIED} prompts of which {N_SHARED} tokens are shared, and 32 "
        "of 200 tokens that share nothing, against the loop by hand at the best of its settings",
        f"{speeds[0] / shared:.2f} × ({speeds[0]:.0f} tokens/s) and {speeds[1] / max(hand):.2f} × ({speeds[1]:.0f})",
    )


def test_overhead(claim, model, prompts):
    """What is not decoding, at 32 sequences."""
    seconds, _, stats, _ = by_us(model, prompts[:N_TRIED], n_parallel=32, flash_attn="off")
    rest = seconds - stats.decode_seconds
    claim(
        61,
        "everything but llama_decode (planning, forking, sampling, text), 32 sequences",
        f"{100 * rest / seconds:.2f} % of {seconds:.1f} s; planning {100 * stats.schedule_seconds / seconds:.2f} %",
        100 * rest / seconds,
        2.0,
        unit="%",
    )


def completions_one_by_one(prompts: Prompts, n_generate: int) -> tuple[float, float, bool]:
    """``create_completion`` after the first prompt: tokens and prompts a second, and whether with flash attention."""
    llama_cpp = pytest.importorskip("llama_cpp")
    found = []
    for flash in (False, True):
        llm = llama_cpp.Llama(
            str(models.smollm2()),
            n_ctx=1024,
            n_threads=CORES,
            n_threads_batch=CORES,
            flash_attn=flash,
            verbose=False,
        )
        try:
            llm.create_completion(prompts[0].tolist(), max_tokens=1, temperature=0)
            started, n = time.perf_counter(), 0
            for prompt in prompts[1:]:
                made = llm.create_completion(prompt.tolist(), max_tokens=n_generate, temperature=0)
                n += made["usage"]["completion_tokens"]
            seconds = time.perf_counter() - started
        finally:
            llm.close()
        found.append((n / seconds, (len(prompts) - 1) / seconds, flash))
    return max(found)


def test_against_llama_cpp_python(claim, model, prompts, ours):
    """``create_completion`` one after the other, which keeps the prefix that its prompt shares with the last."""
    n = N_PROMPTS // 4
    theirs, _, flash = completions_one_by_one(prompts[: n + 1], N_GENERATE)
    if N_PROMPTS > N_TRIED:
        seconds, results, *_ = by_us(model, prompts[:N_PROMPTS], n_parallel=16, flash_attn="off")
        ours = rate(results, seconds)
    claim(
        62,
        f"{N_PROMPTS} of them against llama-cpp-python's create_completion in a loop ({n} of them, its prefix warm)",
        f"{ours / theirs:.2f} ×: {ours:.0f} against {theirs:.0f} tokens/s (flash attention {on(flash)})",
        ours / theirs,
        1.4,
        at_least=True,
    )


def served(python: str, script: str, prompts: Prompts, tried: Sequence[dict[str, object]]) -> tuple[float, str, str]:
    """The best of several settings of a server: tokens a second, the settings, the version.

    It gets the shared prefix by itself first, without which most of the prompts, which come all at once, find nothing
    to share. That is part of the time, as it is of ours.
    """
    found = []
    for settings in tried:
        task = {"model": str(models.smollm2()), "n_threads": CORES, **settings}
        with Peer(python, script, task) as peer:
            first = peer.ask({"prompts": [prompts[0][:N_SHARED].tolist()], "n_generate": 1})
            rest = peer.ask({"prompts": [prompt.tolist() for prompt in prompts], "n_generate": N_GENERATE})
            words = f"{settings['n_parallel']} slots, flash attention {on(settings['flash_attn'])}"
            speed = rest["tokens"] / (first["seconds"] + rest["seconds"])
            found.append((speed, words, str(peer.facts["version"])))
    return max(found)


def llama_server() -> tuple[str | None, Path | None]:
    """The interpreter for, and the file of, the server in llama-cpp-python's examples."""
    named = os.environ.get("LLAMASTATE_LLAMA_SERVER")
    found = [Path(named)] if named else sorted(ROOT.glob(".venv-server/llama_cpp_python-*/examples/server/server.py"))
    python = python_of("LLAMASTATE_LLAMA_SERVER_PYTHON", ".venv-server")
    return python, next((path for path in reversed(found) if path.exists()), None)


def test_against_the_example_server(claim, prompts, ours):
    what = "the same against the batching server of llama-cpp-python's examples: the prefix first, then all at once"
    python, server = llama_server()
    if python is None or server is None:
        claim(71, what, "not installed (make bench-peers)", None, 1.15, at_least=True)
        return
    # every slot holds its prompt whole in its books, so its context has to be that large; one slot keeps the prefix
    tried = [
        {"server": str(server), "n_parallel": n, "flash_attn": flash, "n_ctx": 1024 * n, "n_batch": 512}
        for n, flash in ((17, False), (33, False), (65, False), (33, True))
    ]
    theirs, words, version = served(python, "llama_cpp_server_peer.py", prompts[:N_TRIED], tried)
    claim(
        71,
        what,
        f"{ours / theirs:.2f} ×: {ours:.0f} against {theirs:.0f} tokens/s ({version}; {words}, the best of 4 settings)",
        ours / theirs,
        1.15,
        at_least=True,
    )


def test_against_xllamacpp(claim, prompts, ours):
    what = "the same against xllamacpp's server with 16 slots"
    python = python_of("LLAMASTATE_XLLAMACPP_PYTHON", ".venv-xllamacpp")
    if python is None:
        claim(73, what, "not installed (make bench-peers)", None, 5, at_least=True)
        return
    # each slot computes the prefix for itself, so it is a cache of its own for each, and flash attention, that is best
    tried = [{"n_parallel": 16, "flash_attn": True, "kv_unified": False, "n_ctx": 16 * 1024, "n_batch": 2048}]
    theirs, words, version = served(python, "xllamacpp_peer.py", prompts[:N_TRIED], tried)
    claim(
        73,
        what,
        f"{ours / theirs:.1f} ×: {ours:.0f} against {theirs:.0f} tokens/s ({version}; {words})",
        ours / theirs,
        5,
        at_least=True,
    )


def one_at_a_time(model: Model, prompts: Prompts, outputs: Sequence[Output]) -> Iterator[tuple[float, list[float]]]:
    """Each output's tokens decoded by themselves, step by step.

    How much better the best token was where the output first has another (0: nowhere), and by how much the log
    probabilities of its tokens had been moved before that.
    """
    ends = [token for token in range(model.n_vocab) if model.is_eog(token)]
    with Context(model, n_ctx=1024, n_seq_max=1, n_batch=512, n_threads=CORES, flash_attn="off") as ctx:
        ctx.prefill(prompts[0][:N_SHARED])
        for prompt, output in zip(prompts, outputs, strict=True):
            ctx.seq_rm(0, N_SHARED, -1)
            ctx.decode(prompt[N_SHARED:])
            shifts: list[float] = []
            row = ctx.logits().astype(np.float64)
            for token, theirs in zip(output.tokens, output.logprobs, strict=True):
                if token != row.argmax():
                    yield float(row.max() - row[token]), shifts
                    break
                shifts.append(
                    abs(float(row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()) - theirs.logprob)
                )
                ctx.decode([token])
                row = ctx.logits().astype(np.float64)
            else:
                stopped = output.finish_reason == "stop"
                yield float(row.max() - row[ends].max()) if stopped else 0.0, shifts


def test_against_one_at_a_time(claim, model, prompts):
    """Greedy outputs, and where they part from those of the prompt alone."""
    some = prompts[:N_TRIED]
    requests = [Request(str(i), p, max_tokens=N_GENERATE, logprobs=0) for i, p in enumerate(some)]
    with BatchRunner(model, n_parallel=32, n_threads=CORES, flash_attn="off") as runner:
        results = {result.id: result for result in runner.run(requests)}
    outputs = [results[request.id].outputs[0] for request in requests]
    found = list(one_at_a_time(model, some, outputs))
    parted = [gap for gap, _ in found if gap]
    shifts = [shift for _, shifts in found for shift in shifts]
    where = f": {statistics.median(parted):.2f}, {max(parted):.2f} at most" if parted else ""
    claim(
        74,
        "greedy outputs of those 64 prompts that equal decoding one at a time; how far apart the two logits are where "
        "others part, against twice what the shape of batches moves log probabilities elsewhere",
        f"{len(some) - len(parted)} of {len(some)}; apart{where}; elsewhere moved by {statistics.median(shifts):.2f}, "
        f"{max(shifts):.2f} at most",
        max(parted, default=0) / (2 * max(shifts)),
        1,
    )


def test_fixed_shapes(claim, model, prompts):
    some = prompts[:32]
    free, results, *_ = by_us(model, some, 16, n_parallel=16, flash_attn="off")
    fixed, same, *_ = by_us(model, some, 16, n_parallel=16, flash_attn="off", fixed_shapes=True, n_ctx=27 * 1024)
    equal = sum(np.array_equal(results[i].outputs[0].tokens, same[i].outputs[0].tokens) for i in results)
    claim(
        63,
        "fixed_shapes, against not: 32 of those prompts, 16 sequences, 16 tokens generated",
        f"{rate(same, fixed) / rate(results, free):.2f} × as fast; {equal} of 32 texts are equal",
    )


def whence(stats: BatchStats) -> str:
    """Where the tokens of prompts came from."""
    computed = stats.prompt_tokens - stats.cached_tokens
    forked = stats.cached_tokens - stats.stored_tokens
    return f"{computed:,} computed, {stats.stored_tokens:,} read from the store, {forked:,} forked"


def test_groups(claim, model, text, folder):
    """8 groups of 16 in random order, 400 shared tokens each."""
    grouped = [
        np.concatenate([text[3000 * g + 1 : 3000 * g + 401], text[3000 * g + 500 + 20 * i : 3000 * g + 516 + 20 * i]])
        for g in range(8)
        for i in range(16)
    ]
    order = np.random.default_rng(0).permutation(len(grouped))
    grouped = [grouped[i] for i in order]
    tried = {flash: by_us(model, grouped, 8, n_parallel=32, flash_attn=flash) for flash in ("off", "on")}
    ours_with, (seconds, _, stats, _) = min(tried.items(), key=lambda item: item[1][0])
    possible = sum(len(p) for p in grouped) - 8 * 400 - 128 * 16
    claim(
        64,
        "8 groups of 16 prompts in random order, 400 shared tokens each: prompt tokens not computed, of all possible",
        f"{stats.cached_tokens / possible:.3f}: {stats.cached_tokens:,} of {possible:,}",
        stats.cached_tokens / possible,
        0.98,
        at_least=True,
    )
    _, theirs, flash = completions_one_by_one(grouped[:9], 8)
    ours = len(grouped) / seconds
    claim(
        65,
        "the same, against llama-cpp-python in a loop (8 of them)",
        f"{ours / theirs:.1f} ×: {ours:.2f} against {theirs:.2f} prompts/s (flash attention {ours_with}, {on(flash)})",
        ours / theirs,
        3,
        at_least=True,
    )
    with PrefixStore(folder / "store", block_tokens=16) as store:
        by_us(model, grouped, 1, n_parallel=32, flash_attn=ours_with, store=store)
        store.flush()
    with PrefixStore(folder / "store", block_tokens=16) as store:
        warm, _, stats, _ = by_us(model, grouped, 8, n_parallel=32, flash_attn=ours_with, store=store)
    claim(
        79,
        "the same again with the store of before, opened anew: prompt tokens from it, read or forked of such",
        f"{stats.hit_rate:.3f}: {whence(stats)}; {seconds:.1f} s without a store, {warm:.1f} s now",
        stats.hit_rate,
        0.95,
        at_least=True,
    )


def test_nothing_shared(claim, model, text):
    alone = [text[1000 * i + 7 * i : 1000 * i + 7 * i + 200] for i in range(16)]
    tried = {}
    for n_parallel, flash in ((8, "off"), (16, "off"), (16, "on")):
        seconds, texts = by_hand(model, alone, n_parallel, flash, 0)
        tried[n_parallel, flash] = sum(map(len, texts)) / seconds
    (n_parallel, flash), speed = max(tried.items(), key=lambda item: item[1])
    seconds, results, *_ = by_us(model, alone, n_parallel=n_parallel, flash_attn=flash)
    ours = rate(results, seconds)
    claim(
        66,
        "16 prompts of 200 tokens that share nothing, against a loop by hand at its best",
        f"{ours / speed:.2f} ×: {ours:.0f} against {speed:.0f} tokens/s ({n_parallel} at once, flash {flash})",
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
        warm, _, stats, _ = by_us(model, some, 4, n_parallel=16, flash_attn="off", store=store)
    claim(
        67,
        "16 of those prompts again, a new runner over the store of before, opened anew: prompt tokens from it, read or "
        "forked of such",
        f"{stats.hit_rate:.3f}: {whence(stats)}; {cold:.1f} s before, {warm:.1f} s now",
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
