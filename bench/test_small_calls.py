"""What our side of a call costs where llama.cpp's side costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import numpy as np
import pytest

from bench import raw
from bench.timing import pairs, seconds, stopwatch
from llamastate import Batch, Context, Model, Sampler
from tests import tiny

CALLS = 2000


def test_get_size(benchmark, claim, ctx):
    get_size = ctx.state_seq_get_size
    through_ctypes = raw.get_size(ctx, 1)

    def ours() -> None:
        for _ in repeat(None, CALLS):
            get_size(1)

    def by_ctypes() -> None:
        for _ in repeat(None, CALLS):
            through_ctypes()

    clock = raw.clock()
    other = stopwatch(by_ctypes) if clock is None else lambda: CALLS * clock(ctx, 1, CALLS)
    result = pairs(benchmark, ours, other, rounds=101, warmup=5)
    scale = 1e6 / CALLS
    above = scale * float(np.median(result.ours - result.other))
    with_ctypes = scale * float(np.median(seconds(by_ctypes, 21)))
    text = f"{above:.2f} µs above: {scale * result.our_median:.2f} µs; "
    if clock is None:
        text += f"no compiler to time C itself, so above ctypes' {with_ctypes:.2f} µs"
    else:
        text += f"the C function itself {scale * result.other_median:.2f}, through ctypes {with_ctypes:.2f}"
    claim(11, "state_seq_get_size on an empty sequence, above the C call", text, above, 1, unit="µs")


@pytest.fixture(scope="module")
def small():
    """A model so small that a decode of it is mostly overhead."""
    with Model(tiny.path("dense")) as model, Context(model, n_ctx=4096, n_seq_max=32, n_threads=1) as ctx:
        for seq in range(32):
            ctx.decode(np.arange(64), seq_id=seq)
        yield ctx


def fresh(function: Callable[[], object], trim: Callable[[], object]) -> Callable[[], float]:
    """Seconds of a decode of tokens that have been taken out again first."""
    timed = stopwatch(function)

    def run() -> float:
        trim()
        return timed()

    return run


def test_decode_one(benchmark, claim, small):
    token = np.array([7], np.int32)
    trim = raw.trim(small, [0], 64)
    by_hand = raw.decode(small, [7], [64], [0])
    result = pairs(benchmark, lambda: small.decode(token), fresh(by_hand, trim), rounds=1001, warmup=50, begin=trim)
    trim()
    claim(
        23,
        "decode of one token, above llama_decode of a batch made beforehand (tiny model)",
        f"{1e6 * float(np.median(result.ours - result.other)):.1f} µs: "
        f"{1e6 * result.our_median:.1f} against {1e6 * result.other_median:.1f}",
    )


def test_decode_many(benchmark, claim, small):
    seqs = list(range(32))
    trim = raw.trim(small, seqs, 64)
    by_hand = raw.decode(small, [7] * 32, [64] * 32, seqs)
    batch = Batch()

    def ours() -> None:
        batch.clear()
        for seq in seqs:
            batch.add(7, pos=64, seq_ids=seq, logits=True)
        small.decode_batch(batch)

    result = pairs(benchmark, ours, fresh(by_hand, trim), rounds=501, warmup=20, begin=trim)
    trim()
    claim(
        24,
        "one token of each of 32 sequences, filling the Batch included, above the same",
        f"{1e6 * float(np.median(result.ours - result.other)):.1f} µs: "
        f"{1e6 * result.our_median:.1f} against {1e6 * result.other_median:.1f}",
    )


def test_sample(benchmark, claim, ctx, tokens):
    ctx.seq_rm(0, len(tokens) - 1, -1)
    ctx.decode(tokens[-1:])
    chain = raw.function("llama_sampler_init_greedy")()
    choose, pointer = raw.function("llama_sampler_sample"), raw.pointer(ctx)
    with Sampler(ctx.model, temperature=0) as greedy, Sampler(ctx.model, temperature=0.8, seed=1) as warm:
        assert greedy.sample(ctx) == choose(chain, pointer, -1)
        result = pairs(
            benchmark,
            lambda: greedy.sample(ctx),
            stopwatch(lambda: choose(chain, pointer, -1)),
            rounds=501,
            warmup=20,
        )
        usual = 1e6 * float(np.median(seconds(lambda: warm.sample(ctx), 201, warmup=10)))
    raw.function("llama_sampler_free")(chain)
    claim(
        25,
        f"Sampler.sample, greedy, against llama_sampler_sample ({ctx.model.n_vocab} tokens)",
        f"{result.ratio:.2f} ×: {1e6 * result.our_median:.0f} against {1e6 * result.other_median:.0f} µs; "
        f"temperature 0.8 with the other defaults {usual:.0f} µs",
    )
