"""Small things that many tests need: tiny models, contexts of one thread, random tokens, comparing logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from llamastate import Context, Model
from tests import devices, tiny
from tests.conftest import THREADS

#: One name for each kind of memory, and the odd ones.
KINDS = ("dense", "iswa", "iswa11", "mamba", "mamba2", "jamba", "lfm2", "lfm2swa", "qwen35", "qwen2vl")


@cache
def model(name: str, **variant: Any) -> Model:
    """A tiny model, loaded once a process; on a device if ``LLAMASTATE_TEST_GPU_LAYERS`` says so."""
    return Model(tiny.path(name, **variant), n_gpu_layers=devices.GPU_LAYERS)


def context(name: str | Model, **params: Any) -> Context:
    """A context of one thread over a tiny model; 512 cells a sequence if nothing else is said."""
    params.setdefault("n_ctx", 512 * params.get("n_seq_max", 1))
    return Context(name if isinstance(name, Model) else model(name), n_threads=THREADS, **params)


def tokens(n: int, seed: int = 0, n_vocab: int = 256) -> npt.NDArray[np.int32]:
    """Random token ids, int32[n]."""
    return np.random.default_rng(seed).integers(0, n_vocab, n).astype(np.int32)


def greedy(ctx: Context, n: int, *, seq_id: int = 0) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Decode ``n`` tokens greedily from the logits there are; they, and the logits after each, float32[n, vocab]."""
    chosen: list[int] = []
    rows = []
    for _ in range(n):
        chosen.append(int(ctx.logits().argmax()))
        ctx.decode(chosen[-1:], seq_id=seq_id)
        rows.append(ctx.logits())
    return chosen, np.array(rows)


def follow(ctx: Context, first: int, n: int, *, seq_id: int = 0) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Decode ``first`` and then greedily, ``n`` tokens in all; the tokens, and the logits after each."""
    ctx.decode([first], seq_id=seq_id)
    row = ctx.logits()
    chosen, rows = greedy(ctx, n - 1, seq_id=seq_id)
    return [first, *chosen], np.array([row, *rows])


def nmse(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Normalised mean squared error."""
    expected = expected.astype(np.float64)
    return float(((found - expected) ** 2).mean() / (expected**2).mean())


def assert_same_logits(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Equal but for the noise of cell order: same argmax everywhere, NMSE at most 1e-5."""
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert nmse(found, expected) <= 1e-5
