"""Getting and setting a state costs what llama.cpp's own copy costs."""

from __future__ import annotations

from bench import raw
from bench.timing import pairs, stopwatch


def test_get_data_into(benchmark, claim, ctx, blob):
    out = blob.copy()
    result = pairs(
        benchmark,
        lambda: ctx.state_seq_get_data_into(out, 0),
        stopwatch(raw.get_data(ctx, out, 0)),
        rounds=201,
        warmup=10,
    )
    claim(
        1,
        "state_seq_get_data_into, warmed buffer, against the C call made raw",
        f"{result.ratio:.3f} × (pairs {result.pair_ratio:.3f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.2f} ms for {blob.nbytes / 1e6:.1f} MB",
        result.ratio,
        1.05,
    )


def test_set_data(benchmark, claim, ctx, blob):
    ctx.schema  # noqa: B018  # learnt at the first restore, which has a row of its own
    result = pairs(
        benchmark,
        lambda: ctx.state_seq_set_data(blob, 0),
        stopwatch(raw.set_data(ctx, blob, 0)),
        rounds=201,
        warmup=10,
    )
    claim(
        2,
        "state_seq_set_data with validation, against the C call made raw",
        f"{result.ratio:.3f} × (pairs {result.pair_ratio:.3f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.2f} ms",
        result.ratio,
        1.10,
    )
