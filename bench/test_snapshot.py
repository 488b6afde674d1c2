"""Snapshots: what they add to the copy, the write and the read that they cannot do without."""

from __future__ import annotations

import numpy as np

from bench import raw
from bench.test_files import write_by_hand
from bench.timing import pairs, seconds, stopwatch
from llamastate import Snapshot, gguf


def test_take(benchmark, claim, ctx, tokens, blob):
    out = np.zeros(blob.nbytes + (1 << 16), np.uint8)
    # the raw call gets the same memory: it makes a difference where the bytes lie
    start = Snapshot.take(ctx, 0, tokens, out=out)._sections[3, 0].offset
    place = out[start : start + blob.nbytes]
    result = pairs(
        benchmark,
        lambda: Snapshot.take(ctx, 0, tokens, out=out),
        stopwatch(raw.get_data(ctx, place, 0)),
        rounds=201,
        warmup=10,
    )
    claim(
        40,
        "Snapshot.take into a reused buffer, against the C call made raw",
        f"{result.ratio:.3f} × (pairs {result.pair_ratio:.3f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.2f} ms for {blob.nbytes / 1e6:.1f} MB",
        result.ratio,
        1.05,
    )


def test_save(benchmark, claim, ctx, tokens, folder):
    ours, by_hand = folder / "ours.llsnap", folder / "by-hand.bin"
    snapshot = Snapshot.take(ctx, 0, tokens)
    data = bytes(memoryview(snapshot))
    held = [snapshot]

    def fresh() -> None:  # sealing belongs to the save
        held[0] = Snapshot.take(ctx, 0, tokens, out=held[0])

    result = pairs(
        benchmark,
        lambda: held[0].save(ours),
        stopwatch(lambda: write_by_hand(by_hand, memoryview(data))),
        rounds=41,
        begin=fresh,
    )
    assert by_hand.read_bytes() == ours.read_bytes()
    claim(
        41,
        "Snapshot.save, checksums and all, durable, against write + fsync + rename of as many bytes",
        f"{result.ratio:.2f} × (pairs {result.pair_ratio:.2f}, {result.spread[0]:.2f}–{result.spread[1]:.2f}): "
        f"{1e3 * result.our_median:.1f} against {1e3 * result.other_median:.1f} ms",
        result.ratio,
        1.15,
    )


def test_open_and_restore(benchmark, claim, ctx, tokens, blob, folder):
    path = folder / "state.llsnap"
    Snapshot.take(ctx, 0, tokens).save(path)
    path.read_bytes()
    source, target = blob.copy(), blob.copy()

    def load() -> None:
        with Snapshot.open(path) as snapshot:
            snapshot.restore(ctx, 1)

    result = pairs(
        benchmark,
        load,
        stopwatch(lambda: np.copyto(target, source)),
        rounds=101,
        warmup=5,
        begin=lambda: ctx.seq_rm(1),
    )
    ctx.seq_rm(1)
    claim(
        42,
        "Snapshot.open, verified, and restore, page cache warm, against memcpy of as many bytes",
        f"{result.ratio:.2f} × (pairs {result.pair_ratio:.2f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.2f} ms",
        result.ratio,
        2.0,
    )


def test_fingerprint(claim, ctx, model):
    def identify() -> None:
        gguf._known.clear()
        gguf.identify(model.path)

    cold = seconds(identify, 21)
    warm = seconds(lambda: ctx.fingerprint, 1001)
    claim(
        43,
        f"telling a model of {model.size / 1e6:.0f} MB by its content, once a process; and the fingerprint after that",
        f"{1e3 * np.median(cold):.1f} ms; {1e6 * np.median(warm):.2f} µs",
    )
