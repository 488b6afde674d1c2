"""Workloads by which the field measures the reuse of prefixes: with the store and without, outputs compared.

Scaled down to what two cores prefill in a minute. Prompts are decoded in steps of a block, with and without the store:
so what is decoded has the same batch shapes, and outputs can be compared token by token.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llamastate import Context
from llamastate.prefix import PrefixStore
from tests import helpers

BLOCK = 64
Tokens = npt.NDArray[np.int32]


def random_tokens(n: int, *seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 49152, n, dtype=np.int32)


@dataclasses.dataclass
class Served:
    """What one run of a workload has given."""

    first: list[float] = dataclasses.field(default_factory=list)
    outputs: list[list[int]] = dataclasses.field(default_factory=list)
    reused: int = 0
    asked: int = 0
    seconds: float = 0.0

    def quantiles(self) -> str:
        return "/".join(f"{1e3 * q:,.0f}" for q in np.percentile(self.first, [50, 90, 99]))


def serve(ctx: Context, prompts: Sequence[Tokens], n_out: int, store: PrefixStore | None = None) -> Served:
    """One prompt after the other, greedily; every one begins with an empty sequence."""
    done = Served()
    start = time.perf_counter()
    for prompt in prompts:
        ctx.seq_rm(0)
        began = time.perf_counter()
        n = 0
        if store is not None:
            n = store.load(ctx, 0, prompt, max_tokens=(len(prompt) - 1) // BLOCK * BLOCK)
        ctx.prefill(prompt[n:])
        output = [int(ctx.logits().argmax())]
        done.first.append(time.perf_counter() - began)
        if store is not None:
            store.put(ctx, 0, prompt)
        for _ in range(n_out - 1):
            ctx.decode(output[-1:])
            output.append(int(ctx.logits().argmax()))
        done.outputs.append(output)
        done.reused += n
        done.asked += len(prompt)
    done.seconds = time.perf_counter() - start
    ctx.seq_rm(0)
    return done


@pytest.fixture(scope="module")
def served(model, new_context):
    with new_context(n_ubatch=BLOCK) as ctx:
        ctx.prefill(random_tokens(BLOCK, 0))
        row = ctx.state_seq_get_size(0) / BLOCK
        ctx.seq_rm(0)
        yield ctx, row


@pytest.fixture
def compare(claim, served, folder: Path) -> Callable[..., None]:
    """``compare(row, name, prompts, n_out)``: serve them with a store on disk and without any."""
    ctx, bytes_a_token = served

    def run(row: int, name: str, prompts: Sequence[Tokens], n_out: int) -> None:
        plain = serve(ctx, prompts, n_out)
        with PrefixStore(folder / "store", block_tokens=BLOCK) as store:
            ours = serve(ctx, prompts, n_out, store)
            store.flush()
            disk = store.stats().disk
        assert disk is not None
        logical = bytes_a_token * sum(map(len, prompts))
        same = sum(a == b for a, b in zip(ours.outputs, plain.outputs, strict=True))
        generated = n_out * len(prompts)
        claim(
            row,
            name,
            f"token hit rate {ours.reused / ours.asked:.2f}; first token p50/p90/p99 {ours.quantiles()} ms, without "
            f"{plain.quantiles()}; {generated / ours.seconds:.0f} generated tokens/s, without "
            f"{generated / plain.seconds:.0f}; {disk.bytes / logical:.2f} bytes stored a logical byte; "
            f"{same} of {len(prompts)} outputs equal",
        )

    return run


def test_prefix_repetition(compare):
    prefixes = [random_tokens(256, 1, i) for i in range(10)]
    prompts = [np.r_[prefixes[i % 10], random_tokens(32, 2, i)] for i in range(24)]
    compare(80, "prefix repetition: 10 prefixes of 256 tokens, 24 prompts of 32 more, 8 generated", prompts, 8)


def test_generated_shared_prefix(compare):
    groups = [random_tokens(512, 3, i) for i in range(3)]
    prompts = [np.r_[groups[i % 3], random_tokens(32, 4, i)] for i in range(15)]
    compare(81, "generated shared prefix: 3 system prompts of 512, 5 questions of 32 each, 8 generated", prompts, 8)


def test_multi_round_chat(compare):
    """What a server sees: each round comes with all that was said before."""
    said = [[random_tokens(96, 5, user, turn) for turn in range(5)] for user in range(3)]
    prompts = [np.concatenate(said[user][: turn + 1]) for turn in range(5) for user in range(3)]
    compare(82, "multi-round chat: 3 users taking turns, 5 rounds, each 96 tokens longer, 8 generated", prompts, 8)


def test_restart_warm(claim, served, folder):
    ctx, _ = served
    prompts = [random_tokens(1024, 6, i) for i in range(3)]
    with PrefixStore(folder / "store", block_tokens=BLOCK) as store:
        cold = serve(ctx, prompts, 1, store)
    with PrefixStore(folder / "store", block_tokens=BLOCK) as store:
        warm = serve(ctx, prompts, 1, store)
    assert cold.reused == 0
    same = sum(a == b for a, b in zip(warm.outputs, cold.outputs, strict=True))
    claim(
        83,
        "restart-warm: 3 prompts of 1,024 tokens, store closed and opened again; time to first token",
        f"the first request {1e3 * warm.first[0]:.0f} ms against {1e3 * cold.first[0]:,.0f} cold; token hit rate "
        f"{warm.reused / warm.asked:.2f}; {same} of {len(prompts)} outputs equal",
    )


class Snapshots:
    """The least recently used go first: whole states, as llama-cpp-python's RAM cache and llama-server keep them.

    Every state may serve whatever begins as it does: the best that such a cache can do.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.held: OrderedDict[bytes, Tokens] = OrderedDict()

    def lookup(self, prompt: Tokens) -> int:
        best, key = 0, b""
        for name, ids in self.held.items():
            n = min(len(ids), len(prompt))
            differ = np.flatnonzero(ids[:n] != prompt[:n])
            found = int(differ[0]) if len(differ) else n
            if found > best:
                best, key = found, name
        if best:
            self.held.move_to_end(key)
        return min(best, len(prompt) - 1)

    def put(self, prompt: Tokens) -> None:
        self.held[prompt.tobytes()] = prompt
        self.held.move_to_end(prompt.tobytes())
        while sum(map(len, self.held.values())) > self.capacity:
            self.held.popitem(last=False)


def test_tier_pressure(claim):
    """Documents asked for by Zipf's law, behind one system prompt; memory for a part of them. A tiny model's rows."""
    chance = np.random.default_rng(8)
    system = chance.integers(0, 256, 64, dtype=np.int32)
    documents = [chance.integers(0, 256, 192, dtype=np.int32) for _ in range(100)]
    weights = 1 / np.arange(1, len(documents) + 1)
    order = chance.choice(len(documents), 500, p=weights / weights.sum())
    prompts = [np.r_[system, documents[i], chance.integers(0, 256, 16, dtype=np.int32)] for i in order]
    size = 16
    texts = []
    with helpers.context("dense", n_seq_max=2, n_ctx=1024) as ctx:
        ctx.decode(prompts[0])
        with PrefixStore(None, block_tokens=size) as probe:
            probe.put(ctx, 0, prompts[0])
            a_token = probe.stats().ram_bytes / (len(prompts[0]) // size * size)
        everything = len(system) + sum(map(len, documents))
        for share in (0.05, 0.1, 0.2, 0.4, 0.8):
            lru = Snapshots(share * everything)
            theirs = asked = 0
            with PrefixStore(None, block_tokens=size, ram_bytes=int(share * everything * a_token)) as store:
                for prompt in prompts:
                    ctx.seq_rm(0)
                    n = store.load(ctx, 0, prompt, max_tokens=len(prompt) - 1)
                    ctx.decode(prompt[n:])
                    store.put(ctx, 0, prompt)
                    theirs += lru.lookup(prompt)
                    lru.put(prompt)
                    asked += len(prompt)
                ours = store.stats().hit_tokens
            texts.append(f"{100 * share:.0f} %: {ours / asked:.2f} against {theirs / asked:.2f}")
    claim(
        84,
        "tier pressure: 500 prompts over 100 documents, Zipf 1.0; token hit rate of the store against an LRU of whole "
        "snapshots, with memory for a part of all documents",
        "; ".join(texts),
    )
