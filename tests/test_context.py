"""Making contexts, feeding them, and what is left when feeding fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llamastate import (
    Batch,
    Context,
    ContextCreateError,
    InvalidBatchError,
    LogitsUnavailableError,
    Model,
    NoKVSlotError,
)
from tests import tiny
from tests.conftest import THREADS
from tests.helpers import KINDS, assert_same_logits, context, follow, model, tokens

every_kind = pytest.mark.parametrize("kind", KINDS)
TEXT = tokens(60, seed=1)


def logits_of(kind: str, ids: Any, **params: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits after every token of a text that is alone in its context."""
    with context(kind, **params) as ctx:
        ctx.decode(ids, logits="all")
        return np.array([ctx.logits(i) for i in range(len(ids))])


# --- what a context is ------------------------------------------------------------------------------------------------


def test_facts():
    with Context(model("dense"), n_ctx=300, n_seq_max=3, n_batch=100, n_ubatch=50, n_threads=1) as ctx:
        assert (ctx.n_ctx, ctx.n_ctx_seq) == (512, 512)  # rounded up to whole blocks of 256
        assert (ctx.n_batch, ctx.n_ubatch, ctx.n_seq_max, ctx.n_threads) == (100, 50, 3, 1)
        assert "n_ctx=512" in repr(ctx)
        ctx.set_n_threads(2)
        assert ctx.n_threads == 2
        assert not ctx.closed
    assert ctx.closed
    assert "closed" in repr(ctx)
    with Context(model("dense"), n_ctx=1024, n_seq_max=4, kv_unified=False, n_threads=1) as ctx:
        assert (ctx.n_ctx, ctx.n_ctx_seq) == (1024, 256)
    with Context(model("dense"), n_threads=1) as ctx:
        assert ctx.n_ctx == model("dense").n_ctx_train == 4096


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", -1),
        ("n_seq_max", 0),
        ("n_seq_max", 257),
        ("n_batch", 0),
        ("n_ubatch", 2**40),
        ("n_threads", 0),
        ("n_threads", 10**6),
        ("flash_attn", "maybe"),
        ("type_k", "f8"),
        ("type_v", None),
        ("on_busy", "sleep"),
        ("n_ctx", 3.5),
        ("rope_freq_base", "x"),
        ("rope_freq_scale", float("nan")),
        ("yarn_orig_ctx", -1),
    ],
)
def test_parameters_out_of_range(name: str, value: Any):
    with pytest.raises(ContextCreateError) as caught:
        Context(model("dense"), **{name: value})
    assert name in str(caught.value)


def test_parameters_that_llama_cpp_refuses():
    """A quantised V cache without flash attention; with its own words for it."""
    with pytest.raises(ContextCreateError) as caught:
        Context(model("dense"), flash_attn="off", type_v="q8_0", n_ctx=256, n_threads=1)
    assert caught.value.params["type_v"]
    with pytest.raises(ContextCreateError):
        Context(Model(tiny.path("dense"), vocab_only=True))
    with pytest.raises(TypeError, match="n_cxt"):
        Context(model("dense"), n_cxt=5)


def test_rope_parameters_reach_the_model():
    plain = logits_of("dense", TEXT)
    np.testing.assert_array_equal(logits_of("dense", TEXT, rope_scaling_type="none"), plain)
    for params in ({"rope_freq_base": 500.0}, {"rope_freq_scale": 0.5, "rope_scaling_type": "linear"}):
        assert np.abs(logits_of("dense", TEXT, **params) - plain).max() > 0.01


# --- which logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        ("last", [9]),
        ("all", list(range(10))),
        (None, []),
        ([0, 1, 0, 0, 1, 0, 0, 0, 0, 0], [1, 4]),
        (np.arange(10) % 3 == 0, [0, 3, 6, 9]),
        ((bool(i == 9) for i in range(10)), [9]),
        (np.zeros(10), []),
    ],
    ids=["last", "all", "none", "list", "mask", "generator", "zeros"],
)
def test_only_the_outputs_that_were_asked_for(wanted: Any, indices: list[int]):
    ids = tokens(10)
    expected = logits_of("dense", ids)
    with context("dense") as ctx:
        assert ctx.decode(ids, logits=wanted) == len(indices)
        for i in range(10):
            if i in indices:
                assert_same_logits(ctx.logits(i), expected[i])
            else:
                with pytest.raises(LogitsUnavailableError):
                    ctx.logits(i)
        for back, i in enumerate(reversed(indices), start=1):
            np.testing.assert_array_equal(ctx.logits(-back), ctx.logits(i))
        for beyond in (10, -len(indices) - 1, 2**31, -(2**31)):
            with pytest.raises(LogitsUnavailableError) as caught:
                ctx.logits(beyond)
            assert (caught.value.index, caught.value.n_outputs) == (beyond, len(indices))


def test_no_logits_before_the_first_decode():
    with context("dense") as ctx:
        for i in (0, -1):
            with pytest.raises(LogitsUnavailableError):
                ctx.logits(i)
            with pytest.raises(IndexError):
                ctx.logits(i, copy=False)


def test_logits_of_a_failed_decode_are_those_before():
    """What is refused before llama.cpp sees it leaves the last outputs."""
    with context("dense") as ctx:
        ctx.decode(TEXT)
        before = ctx.logits()
        for bad in ([256], [], [-1]):
            with pytest.raises(InvalidBatchError):
                ctx.decode(bad)
        np.testing.assert_array_equal(ctx.logits(), before)


def test_embeddings():
    params = {"embeddings": True, "n_ctx": 256}
    with context("dense", **params) as ctx, context("dense", pooling_type="mean", **params) as pooled:
        assert ctx.decode(TEXT[:20], logits="all") == 20
        rows = np.array([ctx.embeddings(i) for i in range(20)])
        assert rows.shape == (20, ctx.model.n_embd_out)
        assert np.isfinite(rows).all()
        assert np.abs(rows[0] - rows[1]).max() > 0
        with pytest.raises(LogitsUnavailableError):
            ctx.embeddings_seq(0)
        pooled.decode(TEXT[:20], logits="all")
        np.testing.assert_allclose(pooled.embeddings_seq(0), rows.mean(0), atol=1e-2)
    with context("dense") as ctx:
        ctx.decode(TEXT[:20])
        with pytest.raises(LogitsUnavailableError):
            ctx.embeddings()


# --- feeding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 60, None])
@every_kind
def test_prefill_is_decoding_in_pieces(kind: str, chunk: int | None):
    expected = logits_of(kind, TEXT)[-1]
    with context(kind, n_batch=33) as ctx:
        assert ctx.prefill(TEXT, chunk=min(chunk or 33, 33)) == 1
        assert ctx.seq_pos_max(0) == len(TEXT) - 1
        assert_same_logits(ctx.logits(), expected)


def test_prefill_goes_on_where_the_sequence_ends():
    with context("dense", n_seq_max=2) as ctx:
        ctx.prefill(TEXT[:25], seq_id=1)
        assert ctx.prefill(TEXT[25:], seq_id=1, chunk=10, logits="all") == 5
        np.testing.assert_allclose(ctx.logits(), logits_of("dense", TEXT)[-1], atol=1e-3)
        assert ctx.seq_pos_max(0) == -1


@pytest.mark.parametrize("ids", [5, np.int64(5), np.array(5), [5], (5,), range(5, 6), np.array([5], np.uint8)])
def test_tokens_in_any_form(ids: Any):
    with context("dense") as ctx:
        ctx.decode(ids)
        np.testing.assert_array_equal(ctx.logits(), logits_of("dense", [5])[0])


def test_position_has_to_follow():
    with context("dense") as ctx:
        ctx.decode(TEXT[:10], pos=0)
        ctx.decode(TEXT[10:12], pos=10)
        before = ctx.state_get_data()
        for pos in (0, 11, 13, 2**31 - 1, -1):
            with pytest.raises(InvalidBatchError) as caught:
                ctx.decode([1], pos=pos)
            assert caught.value.value == pos
        np.testing.assert_array_equal(ctx.state_get_data(), before)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@every_kind
def test_several_sequences_at_once(kind: str, unified: bool):
    """Texts of different lengths in one batch, token by token in turns: each as if it were alone."""
    texts = {seq: tokens(12 + 5 * seq, seed=seq) for seq in range(4)}
    with context(kind, n_seq_max=4, kv_unified=unified) as ctx:
        batch, last = Batch(), {}
        for i in range(max(map(len, texts.values()))):
            for seq, ids in texts.items():
                if i < len(ids):
                    last[seq] = len(batch)
                    batch.add(int(ids[i]), pos=i, seq_ids=seq, logits=i == len(ids) - 1)
        assert ctx.decode_batch(batch) == 4
        for seq, ids in texts.items():
            assert_same_logits(ctx.logits(last[seq]), logits_of(kind, ids)[-1])
        for seq, ids in texts.items():
            with context(kind) as alone:
                alone.decode(ids)
                assert_same_logits(follow(ctx, 3, 4, seq_id=seq)[1], follow(alone, 3, 4)[1])


@every_kind
def test_tokens_that_sequences_share(kind: str):
    """One text fed to two sequences at once, which part then. Purely recurrent memories have no place for that."""
    with context(kind, n_seq_max=3) as ctx:
        batch = Batch()
        batch.extend(TEXT, pos=0, seq_ids=[0, 2], logits="last")
        if tiny.MODELS[kind].kind == "recurrent":
            before = ctx.state_get_data()
            with pytest.raises(InvalidBatchError, match="recurrent"):
                ctx.decode_batch(batch)
            np.testing.assert_array_equal(ctx.state_get_data(), before)
            return
        assert ctx.decode_batch(batch) == 1
        assert [ctx.seq_pos_max(seq) for seq in range(3)] == [59, -1, 59]
        for seq, first in ((0, 5), (2, 9)):
            with context(kind) as alone:
                alone.decode(TEXT)
                assert_same_logits(follow(ctx, first, 4, seq_id=seq)[1], follow(alone, first, 4)[1])


def test_tokens_cannot_be_shared_between_streams():
    with context("dense", n_seq_max=3, kv_unified=False) as ctx:
        batch = Batch()
        batch.extend(TEXT, pos=0, seq_ids=[0, 2])
        with pytest.raises(InvalidBatchError, match="unified"):
            ctx.decode_batch(batch)
        assert ctx.seq_pos_max(0) == -1


def test_a_batch_can_be_used_again():
    batch = Batch()
    batch.extend(TEXT[:5], pos=0, logits="all")
    batch.add(3, pos=5, seq_ids=[0], logits=True)
    assert len(batch) == 6
    with context("dense") as ctx, context("dense") as other:
        assert ctx.decode_batch(batch) == other.decode_batch(batch) == 6
        np.testing.assert_array_equal(ctx.logits(5), other.logits(5))
        np.testing.assert_array_equal(ctx.logits(5), logits_of("dense", [*TEXT[:5], 3])[5])
        batch.clear()
        assert len(batch) == 0
        with pytest.raises(InvalidBatchError):
            ctx.decode_batch(batch)
        batch.extend(TEXT[:2], pos=6)
        assert ctx.decode_batch(batch) == 0
        assert (ctx.seq_pos_max(0), other.seq_pos_max(0)) == (7, 5)
    with pytest.raises(InvalidBatchError):
        batch.extend([1, 2], pos=0, logits=[True])
    assert len(batch) == 2


# --- feeding that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "lfm2swa", "qwen35", "qwen2vl"])
def test_no_room(kind: str, unified: bool):
    """A full cache: an error, the same state, and everybody goes on."""
    n_ctx = 256 if unified else 512
    with context(kind, n_ctx=n_ctx, n_seq_max=2, kv_unified=unified, n_ubatch=64) as ctx:
        ctx.prefill(TEXT, seq_id=0)
        ctx.prefill(tokens(180 if unified else 240, seed=2), seq_id=1)
        free = 256 - 240
        before = ctx.state_get_data()
        for call in (ctx.decode, ctx.prefill):
            with pytest.raises(NoKVSlotError) as caught:
                call(tokens(free + 1), seq_id=1)
            assert (caught.value.code, caught.value.n_tokens) == (1, free + 1)
            np.testing.assert_array_equal(ctx.state_get_data(), before)
        ctx.decode(tokens(free), seq_id=1)
        if not unified:
            ctx.decode([1], seq_id=0)
        ctx.seq_rm(1)
        with context(kind, n_ctx=n_ctx, n_seq_max=2, kv_unified=unified, n_ubatch=64) as scratch:
            scratch.prefill(TEXT, seq_id=0)
            if not unified:
                scratch.decode([1], seq_id=0)
            assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], follow(scratch, 7, 4, seq_id=0)[1])


@every_kind
def test_a_prefill_that_fails_is_undone(kind: str):
    """It fails in its third piece, because another sequence has the cells. What went before is taken back: to the
    token where that is exact, else the sequence is empty and the error says so.
    """
    recurrent = tiny.MODELS[kind].kind == "recurrent"
    with context(kind, n_ctx=256, n_seq_max=2, n_ubatch=64) as ctx:
        ctx.prefill(tokens(150, seed=3), seq_id=0)
        ctx.prefill(TEXT[:30], seq_id=1)
        other, own = ctx.state_seq_get_data(0), ctx.state_seq_get_data(1)
        long = tokens(120, seed=4)
        if recurrent:  # it has room for any text: let it fail by a token that there is not
            long = np.append(long[:60], np.full(60, 256, np.int32)).astype(np.int32)
        with pytest.raises(InvalidBatchError if recurrent else NoKVSlotError) as caught:
            ctx.prefill(long, seq_id=1, chunk=30)
        np.testing.assert_array_equal(ctx.state_seq_get_data(0), other)
        if caught.value.removed:
            assert tiny.MODELS[kind].kind not in ("attention", "iswa")
            assert caught.value.removed == (1,)
            assert ctx.seq_pos_max(1) == -1
            ctx.prefill(TEXT[:30], seq_id=1)
        else:
            assert ctx.seq_pos_max(1) == 29
            if tiny.MODELS[kind].kind == "attention":
                np.testing.assert_array_equal(ctx.state_seq_get_data(1), own)
        with context(kind) as alone:
            alone.prefill(TEXT[:30])
            assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], follow(alone, 7, 4)[1])


def test_more_than_a_batch():
    with context("dense", n_batch=32) as ctx:
        with pytest.raises(InvalidBatchError) as caught:
            ctx.decode(tokens(33))
        assert caught.value.limit == 32
        assert ctx.seq_pos_max(0) == -1
        with pytest.raises(InvalidBatchError, match="chunk"):
            ctx.prefill(tokens(40), chunk=33)


def test_contexts_of_one_model_are_strangers():
    """They share weights and nothing else."""
    shared = Model(tiny.path("dense"))
    one, two = (Context(shared, n_ctx=256, n_threads=THREADS) for _ in range(2))
    one.decode(TEXT)
    two.decode(TEXT[:5])
    assert_same_logits(one.logits(), logits_of("dense", TEXT)[-1])
    shared.close()
    two.close()
    one.decode([1])
    assert one.seq_pos_max(0) == 60
    one.close()
