"""What take() and restore() accept, what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llamastate import (
    BufferTooSmallError,
    CheckpointFlags,
    CheckpointRecord,
    ClosedError,
    Context,
    InvalidArgumentError,
    InvalidBufferError,
    InvalidSequenceError,
    LogitsUnavailableError,
    NotEnoughCellsError,
    PendingUpdateError,
    Sampler,
    SeqFlags,
    Snapshot,
    TokenizeError,
    TokensMismatchError,
)
from llamastate._native.exporter import Span
from tests.helpers import context, tokens

IDS = tokens(90, seed=9)
NAN, SURROGATE = CheckpointRecord(1, created=math.nan), CheckpointRecord(1, "\ud800")


def test_everything_comes_back(filled: Context, tmp_path):
    row = filled.logits()
    partial = filled.state_seq_get_data(0, SeqFlags.PARTIAL_ONLY)
    records = [
        CheckpointRecord(10, "first", 123, CheckpointFlags.AUTOMATIC),
        CheckpointRecord(90, None, 4.5, CheckpointFlags.PARTIAL | 1 << 20, partial, row),
    ]
    metadata = {"title": "ünïcode", "nested": [1, 2.5, None, {"a": True}]}
    taken = Snapshot.take(
        filled, 0, IDS.tolist(), logits=row, sampler={"seed": 7}, checkpoints=iter(records), metadata=metadata
    )
    taken.save(tmp_path / "s.llsnap")
    for snapshot in (taken, Snapshot.open(tmp_path / "s.llsnap"), Snapshot.open(tmp_path / "s.llsnap", mmap=False)):
        assert snapshot.n_tokens == 90
        assert snapshot.nbytes == (tmp_path / "s.llsnap").stat().st_size
        assert snapshot.seq_flags == SeqFlags.NONE
        assert snapshot.fingerprint == filled.fingerprint
        assert snapshot.metadata == metadata
        assert snapshot.sampler_state == {"seed": 7}
        np.testing.assert_array_equal(snapshot.tokens, IDS)
        np.testing.assert_array_equal(snapshot.logits, row)
        np.testing.assert_array_equal(snapshot.state, filled.state_seq_get_data(0))
        first, second = snapshot.checkpoints
        assert (first.n_tokens, first.label, first.created, first.flags) == (10, "first", 123, 2)
        assert first.state is None
        assert first.logits is None
        assert (second.n_tokens, second.label, second.created, second.flags) == (90, None, 4.5, 1 | 1 << 20)
        np.testing.assert_array_equal(second.state, partial)
        np.testing.assert_array_equal(second.logits, row)
        assert snapshot.checkpoints[-1].n_tokens == 90
        assert [c.n_tokens for c in snapshot.checkpoints[:1]] == [10]
        with pytest.raises(IndexError):
            snapshot.checkpoints[2]
        for array in (snapshot.tokens, snapshot.logits, snapshot.state, second.state, second.logits):
            assert not array.flags.writeable


def test_what_was_not_given_is_not_there(filled: Context):
    snapshot = Snapshot.take(filled, 0, IDS)
    assert snapshot.logits is None
    assert snapshot.sampler_state is None
    assert snapshot.metadata == {}
    assert list(snapshot.checkpoints) == []


def test_sampler(filled: Context):
    sampler = Sampler(filled.model, temperature=0.5, logit_bias={3: -math.inf, 4: 1.5}, seed=8)
    found = Snapshot.take(filled, 0, IDS, sampler=sampler).sampler_state
    assert found == sampler.state
    filled.prefill(IDS, seq_id=1)
    assert Sampler.from_state(filled.model, found).sample(filled) == sampler.sample(filled)


@pytest.mark.parametrize("ids", [IDS[:-1], [*IDS, 1], []], ids=["fewer", "more", "none"])
def test_tokens_out_of_step(filled: Context, ids):
    with pytest.raises(TokensMismatchError) as caught:
        Snapshot.take(filled, 0, ids)
    assert (caught.value.n_tokens, caught.value.pos_min, caught.value.pos_max) == (len(ids), 0, 89)


def test_a_sequence_without_its_beginning(filled: Context):
    """Its tokens are not what it was decoded from any more."""
    filled.seq_rm(0, 0, 10)
    with pytest.raises(TokensMismatchError):
        Snapshot.take(filled, 0, IDS)


def test_a_sequence_with_a_hole(filled: Context):
    filled.seq_rm(0, 10, 20)
    snapshot = Snapshot.take(filled, 0, IDS)
    with pytest.raises(ValueError, match="cells"):
        snapshot.restore(filled, 1)
    assert filled.seq_pos_max(1) == -1


def test_bad_arguments(filled: Context):
    for seq_id in (-7, -1, 2, 300, None, 0.5):
        with pytest.raises(InvalidSequenceError):
            Snapshot.take(filled, seq_id, IDS)
    with pytest.raises(TokenizeError):
        Snapshot.take(filled, 0, [256] * 90)
    with pytest.raises(LogitsUnavailableError):
        Snapshot.take(filled, 0, IDS, logits=np.zeros(3))
    with pytest.raises(InvalidArgumentError):
        Snapshot.take(filled, 0, IDS, logits="first")
    for metadata in ([1], "x", {"a": {1, 2}}, {"a": math.nan}, {"a": b"x"}):
        with pytest.raises(InvalidArgumentError) as caught:
            Snapshot.take(filled, 0, IDS, metadata=metadata)
        assert caught.value.name == "metadata"
    for record in (
        CheckpointRecord(-1),
        CheckpointRecord(1, 5),
        CheckpointRecord(1, flags=-1),
        CheckpointRecord(2**31),
        NAN,
        SURROGATE,
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            Snapshot.take(filled, 0, IDS, checkpoints=[record])
        assert caught.value.name == "checkpoints"
    with pytest.raises(InvalidBufferError):
        Snapshot.take(filled, 0, IDS, checkpoints=[CheckpointRecord(1, state="text")])
    with pytest.raises(TypeError):
        Snapshot()


def test_last_logits_are_the_last_tokens():
    with context("dense", n_seq_max=2) as ctx:
        ctx.prefill(IDS, seq_id=0)
        ctx.prefill(IDS[:20], seq_id=1)
        expected = ctx.logits()
        np.testing.assert_array_equal(Snapshot.take(ctx, 1, IDS[:20], logits="last").logits, expected)
        with pytest.raises(LogitsUnavailableError):
            Snapshot.take(ctx, 0, IDS, logits="last")  # of another sequence
        ctx.decode(IDS[20:22], seq_id=1, logits=[True, False])
        with pytest.raises(LogitsUnavailableError):
            Snapshot.take(ctx, 1, IDS[:22], logits="last")  # of the last token but one
        ctx.decode(IDS[22:24], seq_id=1)
        ctx.seq_rm(1, 23)
        with pytest.raises(LogitsUnavailableError):
            Snapshot.take(ctx, 1, IDS[:23], logits="last")  # of a token that has been removed


def test_pending_shift(filled: Context):
    filled.seq_rm(0, 0, 10)
    filled.seq_add(0, 10, -1, -10)
    with pytest.raises(PendingUpdateError):
        Snapshot.take(filled, 0, IDS[10:])


def test_restore_refuses(filled: Context):
    snapshot = Snapshot.take(filled, 0, IDS)
    for seq_id in (-7, -1, 2, 300, None):
        with pytest.raises(InvalidSequenceError):
            snapshot.restore(filled, seq_id)
    with context("dense", n_ctx=256, n_seq_max=2) as small:
        small.prefill(tokens(200), seq_id=1)
        before = small.state_seq_get_data(1)
        with pytest.raises(NotEnoughCellsError):
            snapshot.restore(small, 0)
        assert small.seq_pos_max(0) == -1
        np.testing.assert_array_equal(small.state_seq_get_data(1), before)


def test_a_vocabulary_that_is_too_small(filled: Context):
    """The tokens of a snapshot are checked as well, and not only by whoever made it."""
    snapshot = Snapshot.take(filled, 0, IDS)
    section = snapshot._sections[2, 0]
    image = bytearray(memoryview(snapshot))
    image[section.offset + 4 : section.offset + 8] = (300).to_bytes(4, "little")
    with pytest.raises(ValueError, match="token 1 is 300"):
        Snapshot.from_buffer(image, verify=False).restore(filled, 1)


def test_closed(filled: Context):
    with Snapshot.take(filled, 0, IDS) as snapshot:
        ids = snapshot.tokens
    assert snapshot.closed
    snapshot.close()
    assert "closed" in repr(snapshot)
    np.testing.assert_array_equal(ids, IDS)  # keeps the memory
    for use in (
        lambda: snapshot.restore(filled, 0),
        lambda: snapshot.tokens,
        lambda: snapshot.nbytes,
        lambda: snapshot.save("x"),
        lambda: Snapshot.take(filled, 0, IDS, out=snapshot),
    ):
        with pytest.raises(ClosedError):
            use()
    filled.close()
    with pytest.raises(ClosedError):
        Snapshot.take(filled, 0, IDS)


# --- where it is put ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [1, 1000, "all"])
def test_out_is_too_small(filled: Context, short):
    needed = Snapshot.take(filled, 0, IDS).nbytes
    out = np.full(0 if short == "all" else needed - short, 7, np.uint8)
    with pytest.raises(BufferTooSmallError) as caught:
        Snapshot.take(filled, 0, IDS, out=out)
    assert (caught.value.needed, caught.value.got) == (needed, len(out))
    assert (out == 7).all()


def test_out_cannot_be_used(filled: Context):
    for out in (bytes(1 << 20), np.zeros((1 << 10, 1 << 11), np.uint8)[:, ::2], "text", 5):
        with pytest.raises(InvalidBufferError):
            Snapshot.take(filled, 0, IDS, out=out)


def test_out_is_used_in_place(filled: Context):
    out = bytearray(1 << 20)
    snapshot = Snapshot.take(filled, 0, IDS, out=out)
    place = np.frombuffer(out, np.uint8)
    assert snapshot.state.ctypes.data - place.ctypes.data == snapshot._sections[3, 0].offset
    with pytest.raises(BufferError):
        out.append(1)  # held
    assert bytes(memoryview(snapshot)) == bytes(out[: snapshot.nbytes])


def test_a_snapshot_is_used_again(filled: Context):
    first = Snapshot.take(filled, 0, IDS)
    address = first._image().address
    second = Snapshot.take(filled, 0, IDS, out=first)
    assert first.closed
    assert second._image().address == address
    assert second.restore(filled, 1) == 90
    filled.prefill(tokens(100), seq_id=0)
    longer = Snapshot.take(filled, 0, [*IDS, *tokens(100)], out=second)  # too small: new memory
    assert second.closed
    assert longer._image().capacity > longer.nbytes
    filled.decode([1], seq_id=0)
    address = longer._image().address
    again = Snapshot.take(filled, 0, [*IDS, *tokens(100), 1], out=longer)
    assert again._image().address == address
    assert again.restore(filled, 1) == 191


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba", "lfm2swa"])
@pytest.mark.parametrize("n", [0, 1, 90])
def test_used_memory_makes_no_difference(kind: str, n: int):
    """How large a state can be at most is known beforehand; how large it is, of some kinds, only afterwards."""
    with context(kind) as ctx:
        if n:
            ctx.prefill(IDS[:n])
        extra = {"logits": "last" if n else None, "metadata": {"n": n}}
        fresh = Snapshot.take(ctx, 0, IDS[:n], **extra)
        for room in (0, 1, 1 << 20):
            out = np.full(fresh.nbytes + room, 7, np.uint8)
            for _ in range(2):
                snapshot = Snapshot.take(ctx, 0, IDS[:n], out=out, **extra)
                assert bytes(memoryview(snapshot)) == bytes(memoryview(fresh))
                assert (out[fresh.nbytes :] == 7).all()


def test_a_span_is_written_inside_only():
    memory = np.full(100, 7, np.uint8)
    span = Span(memory, 10, True)
    span.write(2, b"ab", 6)
    assert memory[:8].tobytes() == b"\7\7ab\0\0\7\7"
    for at, data, end in ((0, b"abc", 2), (-1, b"a", 5), (5, b"", 4), (9, b"ab", 11), (1 << 62, b"a", 1 << 62)):
        with pytest.raises(ValueError, match="do not end before"):
            span.write(at, data, end)
    with pytest.raises(BufferTooSmallError):
        span.resize(101)
    span.resize(100)
    large = np.arange(1 << 16, dtype=np.uint8)
    with pytest.raises(ValueError, match="65536 bytes"):
        span.write(0, large, 100)
    with memoryview(span), pytest.raises(BufferError):
        span.resize(50)
    assert memory[8:].tolist() == [7] * 92
    span.release()
    for use in (lambda: span.resize(1), lambda: span.write(0, b"", 0)):
        with pytest.raises(BufferError, match="released"):
            use()
    with pytest.raises(BufferError, match="read-only"):
        Span(memory, 10, False).write(0, b"a", 1)


def test_a_snapshot_in_use_is_not_overwritten(filled: Context, tmp_path):
    first = Snapshot.take(filled, 0, IDS)
    ids = first.tokens
    with pytest.raises(InvalidBufferError):
        Snapshot.take(filled, 0, IDS, out=first)
    np.testing.assert_array_equal(ids, IDS)
    del ids
    first.save(tmp_path / "s")
    opened = Snapshot.open(tmp_path / "s")
    assert Snapshot.take(filled, 0, IDS, out=opened).restore(filled, 1) == 90  # a mapped file is not written to
    assert opened.closed
    assert Snapshot.open(tmp_path / "s").restore(filled, 1) == 90


def test_a_failed_take_leaves_out_alone(filled: Context):
    first = Snapshot.take(filled, 0, IDS)
    image = bytes(memoryview(first))
    with pytest.raises(TokensMismatchError):
        Snapshot.take(filled, 0, IDS[:-1], out=first)
    assert bytes(memoryview(first)) == image
