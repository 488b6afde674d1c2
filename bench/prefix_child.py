"""What the benches of the prefix store need a process of its own for (``python -m bench.prefix_child``)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import tracemalloc
from typing import Any

import numpy as np

from llamastate import Context, Model
from llamastate.prefix import PrefixStore

BLOCK = 64
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def context(model: Model) -> Context:
    return Context(model, n_ctx=4096, n_seq_max=4, flash_attn="on", n_threads=CORES)


def restart(task: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first token with a store that another process has filled, and without."""
    tokens = np.array(task["tokens"], np.int32)
    with Model(task["model"]) as model:
        with context(model) as ctx:
            ctx.decode(tokens[:1])  # what any first call costs is not the store's
            ctx.clear()
            start = time.perf_counter()
            store = PrefixStore(task["store"], block_tokens=BLOCK)
            opening = time.perf_counter() - start
            n = store.load(ctx, 0, tokens, max_tokens=len(tokens) - 1)
            ctx.prefill(tokens[n:])
            first = int(ctx.logits().argmax())
            with_store = time.perf_counter() - start
            store.close()
        with context(model) as ctx:
            ctx.decode(tokens[:1])
            ctx.clear()
            start = time.perf_counter()
            ctx.prefill(tokens)
            assert int(ctx.logits().argmax()) == first
            prefill = time.perf_counter() - start
    return {"with_store": with_store, "opening": opening, "prefill": prefill}


def memory(task: dict[str, Any]) -> dict[str, float]:
    """The most that Python's allocators, NumPy's among them, were asked for beside what was there before."""
    tokens = np.array(task["tokens"], np.int32)
    with Model(task["model"]) as model:
        contexts = [context(model) for _ in range(task["threads"])]
        for ctx in contexts:
            ctx.prefill(tokens)
        block = int(ctx.state_seq_get_size(0) / len(tokens) * BLOCK)
        limit = 10 * block + 4096
        with PrefixStore(task["store"], block_tokens=BLOCK, ram_bytes=limit) as store:

            def work(ctx: Context) -> None:
                for _ in range(3):
                    store.put(ctx, 0, tokens)
                    store.load(ctx, 1, tokens)
                    ctx.seq_rm(1)

            work(contexts[0])  # imports, schema and caches belong to the first call
            store.flush()
            store.evict()
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            threads = [threading.Thread(target=work, args=(ctx,)) for ctx in contexts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            peak = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()
            assert store.stats().ram_bytes <= limit
        for ctx in contexts:
            ctx.close()
    return {"peak": peak, "limit": limit, "block": block}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump({"restart": restart, "memory": memory}[given["what"]](given), sys.stdout)
