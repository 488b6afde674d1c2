"""Files: a durable save against the same bytes written by hand; a checked load against llama.cpp's own."""

from __future__ import annotations

import os
import secrets
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from bench import raw
from bench.timing import pairs, stopwatch


def write_by_hand(path: Path, data: memoryview) -> None:
    """Write, fsync, rename: the least that leaves either the old file or the new one."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = data
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)


def test_save(benchmark, claim, ctx, tokens, folder):
    ours, by_hand = folder / "ours.bin", folder / "by-hand.bin"
    n_bytes = ctx.state_seq_save_file(ours, 0, tokens)
    data = ours.read_bytes()
    assert len(data) == n_bytes
    result = pairs(
        benchmark,
        lambda: ctx.state_seq_save_file(ours, 0, tokens),
        stopwatch(lambda: write_by_hand(by_hand, memoryview(data))),
        rounds=41,
    )
    assert by_hand.read_bytes() == ours.read_bytes()
    claim(
        8,
        "state_seq_save_file, durable, against write + fsync + rename of as many bytes",
        f"{result.ratio:.2f} × (pairs {result.pair_ratio:.2f}): "
        f"{1e3 * result.our_median:.1f} against {1e3 * result.other_median:.1f} ms",
        result.ratio,
        1.15,
    )


def test_load(benchmark, claim, ctx, tokens, folder):
    path = folder / "state.bin"
    ctx.state_seq_save_file(path, 0, tokens)
    path.read_bytes()
    result = pairs(
        benchmark,
        lambda: ctx.state_seq_load_file(path, 0),
        stopwatch(raw.load_file(ctx, path, 0, len(tokens))),
        rounds=101,
        warmup=5,
    )
    claim(
        9,
        "state_seq_load_file, page cache warm, validated, against llama.cpp's own",
        f"{result.ratio:.2f} × (pairs {result.pair_ratio:.2f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.2f} ms",
        result.ratio,
        1.5,
    )


def test_where_a_save_spends_its_time(claim, ctx, tokens, folder, monkeypatch):
    spent: dict[str, list[float]] = defaultdict(list)
    running: dict[str, float] = {}

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                running[name] = running.get(name, 0.0) + time.perf_counter() - start

        monkeypatch.setattr(module, name, timed)

    for name in ("write", "fsync", "replace"):
        watch(os, name)
    for _ in range(21):
        running.clear()
        start = time.perf_counter()
        ctx.state_seq_save_file(folder / "state.bin", 0, tokens)
        total = time.perf_counter() - start
        for name, value in running.items():
            spent[name].append(value)
        spent["the copy out of llama.cpp and all else"].append(total - sum(running.values()))
    parts = sorted(((float(np.median(v)), k) for k, v in spent.items()), reverse=True)
    claim(27, "where state_seq_save_file spends its time", ", ".join(f"{k} {1e3 * v:.1f} ms" for v, k in parts))
