"""Against ``Llama.save_state`` and ``load_state``, with its own defaults, in the same process.

Each side is timed after untimed calls of its own for as long: neither pays for what the other has left in the caches.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from bench.conftest import CORES
from bench.timing import pairs, settle, stopwatch
from llamastate import Context
from tests import models


@pytest.fixture(scope="module")
def llm(tokens):
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(models.smollm2()), n_ctx=4096, n_threads=CORES, n_threads_batch=CORES, verbose=False)
    llm.eval(tokens.tolist())
    yield llm
    llm.close()


def test_save_state(benchmark, claim, ctx, blob, llm):
    take = partial(ctx.state_seq_get_data_into, blob.copy(), 0)
    result = pairs(
        benchmark, take, stopwatch(llm.save_state, settled=True), rounds=21, warmup=1, begin=partial(settle, take)
    )
    claim(
        3,
        "state_seq_get_data_into against llama-cpp-python's save_state",
        f"{1 / result.ratio:.1f} × faster (pairs {1 / result.pair_ratio:.1f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.1f} ms",
        1 / result.ratio,
        25,
        at_least=True,
    )


def test_load_state(benchmark, claim, ctx, blob, llm):
    put = partial(ctx.state_seq_set_data, blob, 0)
    load = stopwatch(partial(llm.load_state, llm.save_state()), settled=True)
    result = pairs(benchmark, put, load, rounds=21, warmup=1, begin=partial(settle, put))
    claim(
        4,
        "state_seq_set_data against llama-cpp-python's load_state",
        f"{1 / result.ratio:.1f} × faster (pairs {1 / result.pair_ratio:.1f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.1f} ms",
        1 / result.ratio,
        12,
        at_least=True,
    )


def test_attached(benchmark, claim, llm):
    """The same whole-context state of the same ``Llama`` (flash attention off, as its default is), by both."""
    with Context.attach(llm) as attached:
        take = partial(attached.state_get_data_into, np.zeros(attached.state_get_size(), np.uint8))
        result = pairs(
            benchmark, take, stopwatch(llm.save_state, settled=True), rounds=21, warmup=1, begin=partial(settle, take)
        )
    claim(
        21,
        "state_get_data_into on an attached Llama, against its own save_state",
        f"{1 / result.ratio:.1f} × faster: {1e3 * result.our_median:.2f} against {1e3 * result.other_median:.1f} ms",
    )
