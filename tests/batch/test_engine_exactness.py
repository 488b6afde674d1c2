"""Results do not depend on what else runs, on what is shared, stored or parked: for every kind of memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from llamastate import Context, Model, SamplingParams
from llamastate.batch import BatchRunner, Request, Result
from llamastate.batch.parking import Parking
from llamastate.prefix import PrefixStore
from tests.conftest import THREADS
from tests.helpers import KINDS, context, model, tokens

#: Noise of the tiny models' logits, which other shapes of batches and another order of cells make.
NOISE = 0.03
#: And of a real one's, quantised to 4 bits: its activations are quantised too, and fall to this side or that.
REAL_NOISE = 0.6


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def run(m: Model, requests: Iterable[Request], **params: object) -> tuple[dict[str, Result], BatchRunner]:
    settings = {"n_parallel": 4, "n_spare": 2, "n_ctx": 2048, "n_threads": THREADS, **params}
    with BatchRunner(m, **settings) as runner:  # type: ignore[arg-type]
        results = {result.id: result for result in runner.run(requests)}
    assert [r.error for r in results.values() if r.error] == []
    return results, runner


def alike(**fields: object) -> list[Request]:
    """Requests in three groups within a group, in an order that mixes them."""
    shared = tokens(160, 1)
    cuts = (160, 140, 70)
    return [
        Request(str(i), np.concatenate([shared[: cuts[i % 3]], tokens(4 + 5 * i, 100 + i)]), max_tokens=6, **fields)  # type: ignore[arg-type]
        for i in range(9)
    ]


def bits(result: Result) -> list[object]:
    return [(o.tokens.tolist(), o.logprobs, o.finish_reason) for o in result.outputs]


def assert_near_the_truth(m: Model, result: Result) -> None:
    """Every choice has the log probability that decoding the same tokens from scratch gives."""
    for output in result.outputs:
        text = np.concatenate([result.prompt_tokens, output.tokens])
        with context(m, n_ctx=1024) as ctx:
            ctx.decode(text, logits="all")
            rows = np.array([ctx.logits(i) for i in range(result.n_prompt - 1, len(text) - 1)], np.float64)
        rows -= np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) + rows.max(-1, keepdims=True)
        assert output.logprobs is not None
        found = np.array([t.logprob for t in output.logprobs])
        wanted = rows[np.arange(len(rows)), output.tokens]
        assert np.abs(found - wanted).max() <= NOISE


def test_shared_and_forked(kind):
    """Prefixes in prefixes, computed once, against each from scratch."""
    m = model(kind)
    results, runner = run(m, alike(logprobs=0))
    for result in results.values():
        assert_near_the_truth(m, result)
    unshared = sum(len(r.prompt_tokens) for r in results.values())
    assert sum(r.n_cached for r in results.values()) > 0.5 * unshared
    assert runner._engine.scheduler.n_forks >= 8


def test_greedy_against_one_at_a_time(kind):
    """The first difference, if there is any, is where the two best are as good as equal."""
    m = model(kind)
    results, _ = run(m, alike())
    for request in alike():
        chosen = results[request.id].outputs[0].tokens.tolist()
        with context(m, n_ctx=1024) as ctx:
            ctx.prefill(request.prompt)
            for token in chosen:
                row = ctx.logits()
                if token != row.argmax():
                    assert row.max() - row[token] <= NOISE
                    break
                ctx.decode([token])


def test_greedy_against_one_at_a_time_with_real_weights(smollm2_path):
    """Quantised weights make batches of other shapes matter more: outputs part, but only between near-equals."""
    questions = ["What is snow?", "Who was Bach?", "Why is the sky blue?", "How far is the moon?", "What is a list?"]
    with Model(smollm2_path) as m:
        shared = m.tokenize("A patient teacher answers questions of children, briefly and in plain words. " * 6)
        requests = [
            Request(str(i), np.concatenate([shared, m.tokenize(text)]), max_tokens=12, logprobs=0)
            for i, text in enumerate(questions)
        ]
        results, runner = run(m, requests)
        assert runner._engine.scheduler.n_forks >= 3
        with Context(m, n_ctx=512, n_seq_max=1, n_threads=THREADS) as ctx:
            for request in requests:
                (output,) = results[request.id].outputs
                ctx.clear()
                ctx.prefill(request.prompt)
                for token, theirs in zip(output.tokens, output.logprobs, strict=True):
                    row = ctx.logits().astype(np.float64)
                    best = row.max()
                    if token != row.argmax():
                        assert best - row[token] <= REAL_NOISE
                        break
                    assert abs(row[token] - best - np.log(np.exp(row - best).sum()) - theirs.logprob) <= REAL_NOISE
                    ctx.decode([token])


@pytest.mark.parametrize("preempt_bytes", [1 << 30, 0], ids=["in memory", "in files"])
def test_parked(kind, preempt_bytes, tmp_path):
    """More than there is room for: some are put aside, and go on as if nothing had been."""
    m = model(kind)
    sampling = SamplingParams(temperature=0.8, seed=3)
    requests = [
        Request(str(i), tokens(40, i), max_tokens=60, logprobs=0, sampling=sampling, ignore_eos=True) for i in range(8)
    ]
    results, runner = run(m, requests, n_ctx=256, reserve=8, preempt_bytes=preempt_bytes, spill_folder=tmp_path)
    assert runner._parking.n_lost == 0
    assert runner._parking.used == 0
    assert list(tmp_path.iterdir()) == []
    if kind not in ("mamba", "mamba2"):  # their states are as large as they are
        assert sum(r.preemptions for r in results.values()) > 0
    for result in results.values():
        assert len(result.outputs[0].tokens) == 60
        assert_near_the_truth(m, result)


@pytest.mark.parametrize("fault", ["flipped", "cut", "closed", "no folder"])
def test_a_parked_state_that_is_lost(fault, tmp_path, monkeypatch):
    """Its tokens are decoded again, and nobody hears of it. Files have no name: nothing is left, however it ends."""
    real, n_files = Parking.put, 0

    def put(self, ctx, task):
        nonlocal n_files
        real(self, ctx, task)
        assert list(tmp_path.iterdir()) == []
        if task.state is None:
            return
        n_files += 1
        if fault == "flipped":
            size = task.state.seek(0, 2)
            task.state.seek(size // 2)
            byte = task.state.read(1)
            task.state.seek(size // 2)
            task.state.write(bytes([byte[0] ^ 1]))
        elif fault == "cut":
            task.state.truncate(1000)
        else:
            task.state.close()

    monkeypatch.setattr(Parking, "put", put)
    requests = [Request(str(i), tokens(40, i), max_tokens=60, logprobs=0, ignore_eos=True) for i in range(6)]
    folder = tmp_path / "none" if fault == "no folder" else tmp_path
    results, runner = run(model("dense"), requests, n_ctx=256, reserve=8, preempt_bytes=0, spill_folder=folder)
    assert len(results) == len(requests)
    assert runner._parking.n_lost == runner.stats.preemptions > 0
    assert n_files == (0 if fault == "no folder" else runner.stats.preemptions)
    for result in results.values():
        assert len(result.outputs[0].tokens) == 60
        assert_near_the_truth(model("dense"), result)


def test_fixed_shapes(kind):
    """Bit for bit the same: alone, in any order and company, shared or not, and from a store."""
    m = model(kind)
    fixed = {"fixed_shapes": True, "n_ctx": 7 * 512}
    requests = alike(logprobs=2, sampling=SamplingParams(temperature=0.5, seed=1))
    together, runner = run(m, requests, **fixed)
    assert runner._engine.scheduler.n_forks > 0
    backwards, _ = run(m, requests[::-1], **fixed)
    alone = {r.id: run(m, [r], **fixed)[0][r.id] for r in requests[:2]}
    with PrefixStore(None) as store:
        run(m, requests, store=store, **fixed)
        stored, runner = run(m, requests[::-1], store=store, **fixed)
    assert runner._engine.counts.stored_tokens > 0
    for request in requests:
        wanted = bits(together[request.id])
        assert bits(backwards[request.id]) == wanted
        assert bits(stored[request.id]) == wanted
        assert bits(alone.get(request.id, together[request.id])) == wanted


def test_the_same_again(kind):
    """The same requests give the same batches, and so the same bits, without any further ado."""
    m = model(kind)
    first, _ = run(m, alike(logprobs=1))
    again, _ = run(m, alike(logprobs=1))
    assert {i: bits(r) for i, r in first.items()} == {i: bits(r) for i, r in again.items()}


def test_from_the_store(kind, tmp_path):
    m = model(kind)
    with PrefixStore(tmp_path, block_tokens=16) as store:
        run(m, alike(), store=store)
        store.flush()
        results, runner = run(m, alike(logprobs=0), store=store)
    assert runner._engine.counts.stored_tokens > 0
    for result in results.values():
        assert_near_the_truth(m, result)
        assert result.n_cached >= 64  # the first of each group too: nothing that others begin with is computed again


def test_several_outputs_of_one_prompt(kind):
    """The prompt is computed once; each output is what a request of its own with that seed gives."""
    m = model(kind)
    prompt = tokens(50, 5)
    sampling = SamplingParams(temperature=30.0, seed=10)
    many = Request("many", prompt, n=6, max_tokens=8, sampling=sampling, logprobs=0)
    results, runner = run(m, [many, Request("other", tokens(30, 6), max_tokens=8)])
    assert runner._engine.counts.decoded_tokens == 50 + 6 * 7 + 30 + 7
    outputs = results["many"].outputs
    assert [o.index for o in outputs] == list(range(6))
    assert len({tuple(o.tokens.tolist()) for o in outputs}) > 1
    assert_near_the_truth(m, results["many"])
    fixed = {"fixed_shapes": True, "n_ctx": 7 * 512}
    together, _ = run(m, [many], **fixed)
    third = Request("third", prompt, max_tokens=8, sampling=SamplingParams(temperature=30.0, seed=13), logprobs=0)
    own, _ = run(m, [third], **fixed)
    assert own["third"].outputs[0].tokens.tolist() == together["many"].outputs[3].tokens.tolist()
    assert own["third"].outputs[0].logprobs == together["many"].outputs[3].logprobs


def test_embeddings(kind):
    """The mean over all tokens, in whatever company, as llama.cpp's own mean pooling has it."""
    m = model(kind)
    requests = [Request(str(i), tokens(5 + 61 * i, i), kind="embed") for i in range(12)]
    results, _ = run(m, [*requests, Request("text", tokens(20), max_tokens=3)])
    with context(m, n_ctx=1024, embeddings=True, pooling_type="mean", n_ubatch=1024) as ctx:
        for request in requests:
            ctx.clear()
            ctx.decode(request.prompt)
            wanted = ctx.embeddings_seq(0)
            found = results[request.id].embedding
            assert found.dtype == np.float32
            assert np.abs(found - wanted / np.linalg.norm(wanted)).max() < 1e-3
    assert len(results["text"].outputs[0].tokens) == 3
