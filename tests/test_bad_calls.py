"""Arguments that cannot be: which error, with what in it, and that nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import (
    Batch,
    ClosedError,
    Context,
    DecodeError,
    InvalidBatchError,
    InvalidFlagsError,
    InvalidPositionError,
    InvalidSequenceError,
    LogitsUnavailableError,
    Model,
    NoKVSlotError,
    PendingUpdateError,
    SeqFlags,
    TokenizeError,
)
from tests import tiny
from tests.bad import Pair, pair
from tests.helpers import KINDS, context, model, tokens

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["dense", "iswa", "mamba", "jamba", "qwen2vl"])
def p(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pair(request.param) as found:
        yield found


@pytest.fixture
def dense() -> Iterator[Pair]:
    with pair("dense", n_batch=64, n_ubatch=32) as found:
        yield found


# --- sequence ids and flags -------------------------------------------------------------------------------------------

BAD_IDS = [-7, -1, 4, 300, 2**31, 2**63, 2**70, -(2**70), "0", None, 0.0, 1.5, np.float32(1), [0], (), b"1"]


@pytest.mark.parametrize("seq_id", BAD_IDS, ids=repr)
def test_sequence_ids_that_do_not_exist(p: Pair, seq_id: Any, tmp_path: Path):
    ctx = p.ctx
    blob = ctx.state_seq_get_data(0)
    file = tmp_path / "state"
    ctx.state_seq_save_file(file, 0, [1])
    kept = file.read_bytes()
    calls: list[Callable[[], Any]] = [
        lambda: ctx.state_seq_get_size(seq_id),
        lambda: ctx.state_seq_get_data(seq_id),
        lambda: ctx.state_seq_get_data(seq_id, SeqFlags.ON_DEVICE),
        lambda: ctx.state_seq_get_data_into(np.empty(10**6, np.uint8), seq_id),
        lambda: ctx.state_seq_set_data(blob, seq_id),
        lambda: ctx.state_seq_set_data(blob, seq_id, SeqFlags.PARTIAL_ONLY),
        lambda: ctx.state_seq_set_data(blob, seq_id, SeqFlags.ON_DEVICE),
        lambda: ctx.state_seq_save_file(file, seq_id, [1]),
        lambda: ctx.state_seq_load_file(file, seq_id),
        lambda: ctx.seq_pos_min(seq_id),
        lambda: ctx.seq_pos_max(seq_id),
        lambda: ctx.seq_rm(seq_id),
        lambda: ctx.seq_cp(seq_id, 2),
        lambda: ctx.seq_cp(0, seq_id),
        lambda: ctx.seq_keep(seq_id),
        lambda: ctx.seq_add(seq_id, 0, -1, 1),
        lambda: ctx.seq_div(seq_id, 0, -1, 2),
        lambda: ctx.embeddings_seq(seq_id),
        lambda: ctx.decode([1], seq_id=seq_id),
        lambda: ctx.decode([1], seq_id=seq_id, pos=0),
        lambda: ctx.prefill([1], seq_id=seq_id),
    ]
    for call in calls:
        with p.refuses(InvalidSequenceError, n_seq_max=4) as caught:
            call()
        assert caught[0].seq_id is seq_id or caught[0].seq_id == seq_id
        assert isinstance(caught[0], ValueError)
    assert file.read_bytes() == kept


def test_sequence_ids_of_any_integer_type(dense: Pair):
    for one in (1, True, np.int64(1), np.uint8(1)):
        assert dense.ctx.seq_pos_max(one) == 8
    assert dense.ctx.state_seq_get_size(np.int8(1)) == dense.ctx.state_seq_get_size(1)


@pytest.mark.parametrize("flags", [4, 8, 7, 255, -1, 2**31, 2**32, 2**70, "1", None, 1.0, [1]], ids=repr)
def test_flags_that_do_not_exist(p: Pair, flags: Any):
    blob = p.ctx.state_seq_get_data(0)
    for call in (
        lambda: p.ctx.state_seq_get_size(0, flags),
        lambda: p.ctx.state_seq_get_data(0, flags),
        lambda: p.ctx.state_seq_get_data_into(np.empty(10**6, np.uint8), 0, flags),
        lambda: p.ctx.state_seq_set_data(blob, 0, flags),
    ):
        with p.refuses(InvalidFlagsError, flags=flags, known=3):
            call()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "facts"),
    [
        ([3, -1], {"index": 1, "value": -1, "limit": 256}),
        ([256], {"index": 0, "value": 256, "limit": 256}),
        ([1, 2, 2**31], {"index": 2, "value": 2**31}),
        (np.array([-(2**31) - 1]), {"index": 0, "value": -(2**31) - 1}),
        ([2**70], {}),
        ([1.0], {}),
        ([True], {}),
        (["1"], {}),
        ("1", {}),
        (b"1", {}),
        ([[1, 2]], {}),
        ([[1], [2, 3]], {}),
        (np.zeros((2, 2), np.int32), {}),
        ([], {"n_tokens": 0}),
        (np.arange(65), {"n_tokens": 65, "value": 65, "limit": 64}),
        ({1, 2}, {}),
        (None, {}),
        (object(), {}),
        ([None], {}),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, dict) else "",
)
def test_tokens_that_cannot_be_decoded(dense: Pair, bad: Any, facts: Any):
    with dense.refuses(InvalidBatchError, code=-1, **facts) as caught:
        dense.ctx.decode(bad)
    assert caught[0].reason
    assert isinstance(caught[0], ValueError)
    if not isinstance(bad, np.ndarray) or bad.size != 65:  # which prefill cuts
        with dense.refuses(InvalidBatchError, code=-1):
            dense.ctx.prefill(bad)


@each_kind
def test_positions_that_do_not_follow(kind: str):
    with pair(kind) as p:
        gaps = [39, 0, -1, -5] + [41, 50, 2**31 - 2] * (not p.ctx._handle.m_rope)
        for pos in gaps:
            with p.refuses(InvalidBatchError, index=0, value=pos):
                p.ctx.decode([1], pos=pos)
        for pos in (2**31 - 1, 2**31, 2**40, -(2**70)):
            with p.refuses(InvalidBatchError, reason="position", index=0, value=pos):
                p.ctx.decode([1], pos=pos)
        for pos in ("0", 1.5, []):
            with p.refuses(InvalidPositionError):
                p.ctx.decode([1], pos=pos)
        with p.refuses(InvalidBatchError, index=0):
            p.ctx.decode([1], seq_id=2, pos=5)  # an empty sequence begins at 0


def test_masks_that_cannot_be(dense: Pair):
    for mask in ("first", "", 5, [1, 1], [], [[1]], [[1], [1, 2]], object()):
        with dense.refuses(InvalidBatchError, code=-1):
            dense.ctx.decode([1], logits=mask)


def test_chunks_that_cannot_be(dense: Pair):
    for chunk in (0, -1, 65, 2**70):
        with dense.refuses(InvalidBatchError, reason="chunk", value=chunk, limit=64):
            dense.ctx.prefill([1, 2], chunk=chunk)
    for chunk in ("1", 1.5, []):
        with dense.refuses(InvalidBatchError):
            dense.ctx.prefill([1, 2], chunk=chunk)


def one(token: Any = 5, pos: Any = 40, seq_ids: Any = 0, **more: Any) -> Batch:
    batch = Batch()
    batch.add(token, pos=pos, seq_ids=seq_ids, **more)
    return batch


def test_batches_that_cannot_be(dense: Pair):
    cases: list[tuple[Any, dict[str, Any]]] = [
        (one(token=-1), {"index": 0, "value": -1, "limit": 256}),
        (one(token=256), {"index": 0, "value": 256}),
        (one(token=2**40), {"index": 0, "value": 2**40}),
        (one(token="a"), {}),
        (one(token=None), {}),
        (one(pos=41), {"index": 0, "value": 41, "limit": 40}),
        (one(pos=-1), {"index": 0, "value": -1}),
        (one(pos=2**31 - 1), {"index": 0}),
        (one(pos=2**40), {"index": 0, "value": 2**40}),
        (one(pos=1.5), {}),
        (one(seq_ids=4), {"index": 0, "value": 4, "limit": 4}),
        (one(seq_ids=-1), {"index": 0, "value": -1}),
        (one(seq_ids=[0, 0]), {"index": 0, "value": 0}),
        (one(seq_ids=[]), {"index": 0}),
        (one(seq_ids=[0, 2**40]), {}),
        (one(seq_ids="01"), {}),
        (one(seq_ids=[0, 1], pos=40), {"index": 0, "value": 40, "limit": 9}),
        (Batch(), {"n_tokens": 0}),
        (None, {"reason": "no Batch", "value": "NoneType"}),
        ([1, 2], {"reason": "no Batch", "value": "list"}),
    ]
    for batch, facts in cases:
        with dense.refuses(InvalidBatchError, code=-1, **facts):
            dense.ctx.decode_batch(batch)
    large, doubled = Batch(), Batch()
    large.extend(range(65), pos=40)
    doubled.extend([1, 2], pos=40)
    doubled.add(3, pos=41)
    with dense.refuses(InvalidBatchError, n_tokens=65, value=65, limit=64):
        dense.ctx.decode_batch(large)
    with dense.refuses(InvalidBatchError, index=2, value=41, limit=42):
        dense.ctx.decode_batch(doubled)


def test_a_batch_is_as_it_was_after_an_error():
    batch = one()
    for call in (
        lambda: batch.add(1, pos=1, seq_ids=None),
        lambda: batch.add(1, pos=1, seq_ids=1.5),
        lambda: batch.extend([[1]], pos=1),
        lambda: batch.extend([1], pos=None),
        lambda: batch.extend([1], pos=1.5),
        lambda: batch.extend([1, 2], pos=0, seq_ids=object()),
        lambda: batch.extend([1, 2], pos=0, logits="some"),
        lambda: batch.extend([1, 2], pos=0, logits=[1]),
    ):
        with pytest.raises(InvalidBatchError):
            call()
        assert len(batch) == 1
        assert [len(column) for column in batch.arrays()] == [1] * 5


def test_shared_tokens_need_a_unified_cache():
    with pair("dense", kv_unified=False) as p, p.refuses(InvalidBatchError, index=0, value=2, limit=1):
        p.ctx.decode_batch(one(pos=0, seq_ids=[2, 3]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mamba" in kind])
def test_recurrent_models_share_no_tokens(kind: str):
    """llama.cpp says that there is no room."""
    with pair(kind) as p, p.refuses(InvalidBatchError, index=0, value=2, limit=1):
        p.ctx.decode_batch(one(pos=0, seq_ids=[2, 3]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mamba" not in kind])  # which are never full
@pytest.mark.parametrize("unified", [True, False])
def test_a_full_cache(kind: str, unified: bool):
    """There is room for no more tokens; what is there stays usable, and there is room again after a removal."""
    with context(kind, n_ctx=512, n_seq_max=2, kv_unified=unified) as ctx, context(kind, n_ctx=512) as fresh:
        room = ctx.n_ctx_seq - 6
        ctx.decode(tokens(5, seed=1), seq_id=1)
        ctx.prefill(tokens(room - 5 * unified, seed=2), seq_id=0)
        before = [ctx.state_seq_get_data(seq).tobytes() for seq in range(2)]
        with pytest.raises(NoKVSlotError) as caught:
            ctx.decode(tokens(7, seed=3), seq_id=0)
        assert (caught.value.code, caught.value.n_tokens) == (1, 7)
        assert [ctx.state_seq_get_data(seq).tobytes() for seq in range(2)] == before
        with pytest.raises(NoKVSlotError):
            ctx.prefill(tokens(300, seed=3), seq_id=0)
        assert [ctx.state_seq_get_data(seq).tobytes() for seq in range(2)] == before
        ctx.decode(tokens(6, seed=4), seq_id=0)
        with pytest.raises(NoKVSlotError):
            ctx.decode([1], seq_id=0)
        ctx.seq_rm(0)
        ctx.decode(tokens(100, seed=5), seq_id=1)
        fresh.decode(np.r_[tokens(5, seed=1), tokens(100, seed=5)])
        assert int(ctx.logits().argmax()) == int(fresh.logits().argmax())


# --- positions --------------------------------------------------------------------------------------------------------


def test_ranges_that_cannot_be(dense: Pair):
    ctx = dense.ctx
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda bad: ctx.seq_rm(0, bad, 5),
        lambda bad: ctx.seq_rm(0, 5, bad),
        lambda bad: ctx.seq_cp(0, 2, bad, 5),
        lambda bad: ctx.seq_cp(0, 2, 0, bad),
        lambda bad: ctx.seq_add(0, bad, 5, 1),
        lambda bad: ctx.seq_add(0, 0, bad, 1),
        lambda bad: ctx.seq_div(0, bad, 5, 2),
        lambda bad: ctx.seq_div(0, 0, bad, 2),
    )
    for bad in ("0", None, 1.5, [], 2**31, -(2**31), 2**70):
        for call in calls:
            with dense.refuses(InvalidPositionError):
                call(bad)
    for delta in (-1, -(2**31), 2**31 - 1, 2**31 - 40, 2**70, -(2**70)):
        with dense.refuses(InvalidPositionError, reason="out of range", value=delta, limit=0):
            ctx.seq_add(0, 0, -1, delta)
    for divisor in (0, -1, 2**31, 2**70):
        with dense.refuses(InvalidPositionError, reason="divisor", value=divisor):
            ctx.seq_div(0, 0, -1, divisor)
    for other in ("1", None, 1.5):
        with dense.refuses(InvalidPositionError):
            ctx.seq_add(0, 0, -1, other)
        with dense.refuses(InvalidPositionError):
            ctx.seq_div(0, 0, -1, other)


@pytest.mark.parametrize("kind", ["qwen2vl", "qwen35", "lfm2swa"])
def test_positions_that_cannot_be_moved(kind: str):
    """Of M-RoPE models; and of a cache without layers, where llama.cpp would abort at the next decode."""
    with pair(kind) as p:
        for call in (lambda: p.ctx.seq_add(0, 0, -1, 5), lambda: p.ctx.seq_div(0, 0, -1, 2)):
            with p.refuses(InvalidPositionError, reason="no shift", value=(0, -1)):
                call()


@each_kind
def test_copies_that_cannot_be_exact(kind: str):
    for unified in (True, False):
        with pair(kind, kv_unified=unified) as p:
            kind_of_memory = p.ctx.model.memory_kind
            if unified and kind_of_memory in ("attention", "iswa"):
                continue
            with p.refuses(InvalidPositionError, reason=kind_of_memory, value=(3, 7), limit=39):
                p.ctx.seq_cp(0, 2, 3, 7)


def test_states_while_positions_are_moving(dense: Pair):
    ctx = dense.ctx
    blob = ctx.state_seq_get_data(1)
    for each in (dense.ctx, dense.twin):
        each.seq_add(0, 0, -1, 1)
    for call, operation in (
        (lambda: ctx.state_seq_get_data(0), "state_seq_get_data"),
        (ctx.state_get_data, "state_get_data"),
        (lambda: ctx.state_seq_save_file("/nowhere/x", 0, []), "state_seq_save_file"),
        (lambda: ctx.state_save_file("/nowhere/x", []), "state_save_file"),
    ):
        with pytest.raises(PendingUpdateError) as caught:
            call()
        assert caught.value.operation == operation
    assert (ctx.seq_pos_min(0), ctx.seq_pos_max(0)) == (1, 40)
    ctx.decode([3], seq_id=1)
    dense.twin.decode([3], seq_id=1)
    ctx.state_seq_set_data(blob, 1)
    dense.twin.state_seq_set_data(blob, 1)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_that_do_not_exist(dense: Pair):
    ctx = dense.ctx
    for each in (dense.ctx, dense.twin):
        each.decode([1, 2, 3], logits=[1, 0, 1])
    for index in (1, 3, -3, 10**6, 2**31, 2**63, -(2**63), 2**70, -(2**70)):
        for call in (ctx.logits, lambda i: ctx.logits(i, copy=False)):
            with dense.refuses(LogitsUnavailableError, index=index, n_outputs=2) as caught:
                call(index)
            assert isinstance(caught[0], IndexError)
    for index in ("0", None, 1.5, []):
        with dense.refuses(LogitsUnavailableError):
            ctx.logits(index)
    for call in (ctx.embeddings, lambda: ctx.embeddings_seq(0)):
        with dense.refuses(LogitsUnavailableError):
            call()
    assert np.array_equal(ctx.logits(0), ctx.logits(-2))
    assert np.array_equal(ctx.logits(2), ctx.logits(-1))


# --- closed -----------------------------------------------------------------------------------------------------------


def test_a_closed_context(tmp_path: Path):
    ctx = context("dense", n_seq_max=2)
    ctx.decode([1, 2])
    blob, whole = ctx.state_seq_get_data(0), ctx.state_get_data()
    ctx.state_seq_save_file(tmp_path / "one", 0, [])
    ctx.state_save_file(tmp_path / "all", [])
    files = {name: (tmp_path / name).read_bytes() for name in ("one", "all")}
    ctx.close()
    ctx.close()
    assert ctx.closed
    assert "closed" in repr(ctx)
    calls: list[Callable[[], Any]] = [
        lambda: ctx.decode([1]),
        lambda: ctx.decode_batch(one(pos=2)),
        lambda: ctx.prefill([1]),
        ctx.logits,
        lambda: ctx.logits(copy=False),
        ctx.embeddings,
        ctx.embeddings_seq,
        lambda: ctx.seq_pos_min(0),
        lambda: ctx.seq_pos_max(0),
        lambda: ctx.seq_rm(0),
        lambda: ctx.seq_cp(0, 1),
        lambda: ctx.seq_keep(0),
        lambda: ctx.seq_add(0, 0, -1, 1),
        lambda: ctx.seq_div(0, 0, -1, 2),
        ctx.clear,
        lambda: ctx.set_n_threads(1),
        lambda: ctx.n_threads,
        ctx.state_get_size,
        ctx.state_get_data,
        lambda: ctx.state_get_data_into(bytearray(10**6)),
        lambda: ctx.state_set_data(whole),
        lambda: ctx.state_save_file(tmp_path / "all", []),
        lambda: ctx.state_load_file(tmp_path / "all"),
        lambda: ctx.state_seq_get_size(0),
        lambda: ctx.state_seq_get_data(0),
        lambda: ctx.state_seq_get_data_into(bytearray(10**6), 0),
        lambda: ctx.state_seq_set_data(blob, 0),
        lambda: ctx.state_seq_set_data(blob, 0, SeqFlags.ON_DEVICE),
        lambda: ctx.state_seq_save_file(tmp_path / "one", 0, []),
        lambda: ctx.state_seq_load_file(tmp_path / "one", 0),
        lambda: ctx.__enter__().decode([1]),
    ]
    for call in calls:
        with pytest.raises(ClosedError) as caught:
            call()
        assert caught.value.what == "context"
        assert isinstance(caught.value, ValueError)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_a_closed_model():
    loaded = Model(tiny.path("chat"))
    ctx = context(loaded)
    loaded.close()
    loaded.close()
    assert loaded.closed
    calls: list[Callable[[], Any]] = [
        lambda: Context(loaded),
        lambda: loaded.meta,
        lambda: loaded.tokenize("a"),
        lambda: loaded.detokenize([1]),
        lambda: loaded.token_to_piece(1),
        lambda: loaded.is_eog(1),
        loaded.chat_template,
        lambda: loaded.apply_chat_template([]),
    ]
    for call in calls:
        with pytest.raises(ClosedError) as caught:
            call()
        assert caught.value.what == "model"
    ctx.decode([1, 2])  # which keeps the weights
    ctx.close()


def test_an_error_in_a_decode_is_no_output(dense: Pair):
    dense.ctx.decode([1])
    dense.twin.decode([1])
    row = dense.ctx.logits()
    with pytest.raises(DecodeError):
        dense.ctx.decode([999])
    assert np.array_equal(dense.ctx.logits(), row)


def test_the_vocabulary_of_a_model_has_an_end():
    chat = model("chat")
    for token in (-1, chat.n_vocab, 2**31, 2**70):
        for call in (chat.token_to_piece, chat.is_eog, lambda t: chat.detokenize([t])):
            with pytest.raises(TokenizeError) as caught:
                call(token)
            assert caught.value.n_vocab == chat.n_vocab
    for token in ("1", None, 1.5, [[1]]):
        for call in (chat.token_to_piece, chat.is_eog, lambda t: chat.detokenize([t])):
            with pytest.raises(TokenizeError):
                call(token)
