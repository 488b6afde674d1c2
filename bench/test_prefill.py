"""What a saved state saves: decoding the tokens again."""

from __future__ import annotations

import numpy as np
import pytest

from bench.timing import seconds
from llamastate import Context, Model
from tests import models


@pytest.fixture(scope="module")
def other_context(new_context):
    with new_context() as context:
        yield context


def test_against_prefill(benchmark, claim, ctx, blob, tokens, other_context, folder):
    out = blob.copy()

    def prefill() -> None:
        other_context.seq_rm(0)  # 0.02 ms
        other_context.prefill(tokens)

    benchmark.pedantic(prefill, rounds=3, warmup_rounds=1)
    prefilled = benchmark.stats.stats.median
    got = float(np.median(seconds(lambda: ctx.state_seq_get_data_into(out, 0), 51, warmup=5)))
    put = float(np.median(seconds(lambda: ctx.state_seq_set_data(blob, 0), 51, warmup=5)))
    path = folder / "state.bin"
    ctx.state_seq_save_file(path, 0, tokens)
    loaded = float(np.median(seconds(lambda: ctx.state_seq_load_file(path, 0), 21, warmup=3)))
    text = "{:,.0f} × faster: {:.2f} ms against " + f"{1e3 * prefilled:,.0f} ms"
    claim(
        12,
        f"copying the state of {len(tokens):,} tokens out, against prefilling them",
        text.format(prefilled / got, 1e3 * got),
    )
    claim(13, "putting it back (state_seq_set_data), against prefill", text.format(prefilled / put, 1e3 * put))
    claim(
        14,
        "loading it from a file (state_seq_load_file, page cache warm), against prefill",
        text.format(prefilled / loaded, 1e3 * loaded),
    )


def test_first_restore(claim, blob):
    """A new model and a new context: this restore also learns what its states look like."""
    first, second = [], []
    for _ in range(5):
        with Model(models.smollm2()) as model, Context(model, n_ctx=4096, n_seq_max=4, flash_attn="on") as ctx:
            first.extend(seconds(lambda ctx=ctx: ctx.state_seq_set_data(blob, 0), 1, warmup=0))
            second.extend(seconds(lambda ctx=ctx: ctx.state_seq_set_data(blob, 0), 1, warmup=0))
    claim(
        20,
        "first state_seq_set_data of a model and a fresh context (touches its memory, learns the layout)",
        f"{1e3 * float(np.median(first)):.1f} ms; the second {1e3 * float(np.median(second)):.1f} ms",
    )


def test_context(benchmark, claim, new_context):
    benchmark.pedantic(lambda: new_context().close(), rounds=21, warmup_rounds=2)
    claim(26, "making and closing a Context of 4,096 cells", f"{1e3 * benchmark.stats.stats.median:.1f} ms")
