"""Every blob llama.cpp makes is valid, says what llama.cpp says, and comes out of the parser byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from llamastate.errors import BufferTooSmallError, InvalidBufferError
from llamastate.layout import parse_context, parse_sequence, validate_context, validate_sequence
from tests.layout.native import KINDS, NAMES, tokens

LENGTHS = (0, 1, 31, 33, 200)


@pytest.mark.parametrize("n_seq_max", [1, 4])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_blobs_of_every_kind(native, name, flash, unified, n_seq_max):
    context = native(name, flash=flash, unified=unified, n_seq_max=n_seq_max)
    schema = context.schema()
    assert schema.kind == KINDS[name]
    for n in LENGTHS:
        context.clear()
        used = range(min(n_seq_max, 3))
        for seq_id in used:
            if n:
                context.decode(tokens(n, seq_id), seq_id)
        for seq_id in range(n_seq_max):
            for flags in (0, 1):
                blob = context.get(seq_id, flags)
                partial = flags == 1 and schema.has_partial
                info = validate_sequence(blob, schema, context.limits, partial=partial)
                low, high = context.span(seq_id)
                assert info.pos_max == high
                # A sequence blob leaves out what the window cache still keeps but nobody sees any more.
                expected_min = max(low, schema.window_start(high)) if "window" in str(schema.parts) else low
                assert info.pos_min == (expected_min if high >= 0 else -1)
                assert info.n_bytes == len(blob)
                assert info.src_seq_id == seq_id
                assert info.is_empty == (high < 0)
                state = parse_sequence(blob, schema, partial=partial)
                assert state.nbytes == len(blob)
                assert state.to_bytes() == blob
                again = np.empty(len(blob), np.uint8)
                assert state.write_into(again) == len(blob)
                assert again.tobytes() == blob

                bare = blob[8:]
                info = validate_sequence(bare, schema, context.limits, partial=partial, header=False)
                assert (info.pos_min, info.pos_max) == (expected_min if high >= 0 else -1, high)
                assert info.src_seq_id == (None if high < 0 or not (info.n_cells or info.n_window_cells) else seq_id)
                assert parse_sequence(bare, schema, partial=partial, header=False).to_bytes() == bare
                assert state.with_header(False).to_bytes() == bare
                assert state.with_header(False).with_header(True).to_bytes() == blob

        whole = context.get_all()
        spans = {s: context.span(s) for s in range(n_seq_max)}
        assert validate_context(whole, schema, context.limits).sequences == {
            s: span for s, span in spans.items() if span[1] >= 0
        }
        parsed = parse_context(whole, schema)
        assert parsed.nbytes == len(whole)
        assert parsed.to_bytes() == whole
        for seq_id in range(n_seq_max):
            assert parsed.extract(seq_id).to_bytes() == context.get(seq_id)


@pytest.mark.parametrize("name", NAMES)
def test_on_device_blobs_lack_only_tensors(native, name):
    context = native(name)
    schema = context.schema()
    context.decode(tokens(50))
    blob = context.get(flags=2)
    info = validate_sequence(blob, schema, context.limits, on_device=True)
    assert info == validate_sequence(context.get(), schema, context.limits)._replace(n_bytes=len(blob))


@pytest.mark.parametrize("type_kv", [0, 1, 8, 30])
@pytest.mark.parametrize("name", ["dense", "iswa", "jamba", "lfm2swa"])
def test_types_of_the_cache(native, name, type_kv):
    context = native(name, type_kv=type_kv)
    schema = context.schema()
    context.decode(tokens(40))
    blob = context.get()
    validate_sequence(blob, schema, context.limits)
    assert parse_sequence(blob, schema).to_bytes() == blob
    assert all(entry[0] == type_kv for part in schema.parts if hasattr(part, "k") for entry in (*part.k, *part.v))


def test_views_copy_nothing(native):
    context = native("iswa", flash=False)
    schema = context.schema()
    context.decode(tokens(40))
    blob = np.frombuffer(bytearray(context.get()), np.uint8)
    state = parse_sequence(blob, schema)
    assert state.base is not None
    assert state.window is not None
    for part in (state.base, state.window):
        for array in (part.cells, *part.tensors()):
            assert np.shares_memory(array, blob)
            assert not array.flags.writeable
    assert np.shares_memory(state.blob, blob)
    cut = state.slice(3, 20)
    assert cut.base is not None
    assert all(np.shares_memory(array, blob) for array in cut.base.tensors())


def test_buffers_of_any_kind(native):
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(5))
    blob = context.get()
    for buffer in (bytearray(blob), memoryview(blob), np.frombuffer(blob, np.uint8).reshape(1, -1)):
        assert parse_sequence(buffer, schema).to_bytes() == blob
        assert validate_sequence(buffer, schema, context.limits).pos_max == 4
    for bad in (None, "text", np.frombuffer(blob, np.uint8)[::2], 7):
        with pytest.raises(InvalidBufferError):
            validate_sequence(bad, schema, context.limits)
        with pytest.raises(InvalidBufferError):
            parse_sequence(bad, schema)
    state = parse_sequence(blob, schema)
    small = bytearray(len(blob) - 1)
    with pytest.raises(BufferTooSmallError) as caught:
        state.write_into(small)
    assert (caught.value.needed, caught.value.got) == (len(blob), len(blob) - 1)
    assert small == bytearray(len(blob) - 1)
    with pytest.raises(InvalidBufferError):
        state.write_into(blob)
    roomy = bytearray(len(blob) + 9)
    assert state.write_into(roomy) == len(blob)
    assert roomy[: len(blob)] == blob


def test_shared_cells(native):
    """After ``seq_cp`` cells belong to several sequences, and records differ in size."""
    for name in ("dense", "iswa", "jamba", "qwen2vl"):
        context = native(name, n_seq_max=4)
        schema = context.schema()
        context.decode(tokens(70))
        for dst in (1, 3):
            context.copy(0, dst)
            context.decode(tokens(5, dst), dst)
        whole = context.get_all()
        info = validate_context(whole, schema, context.limits)
        assert info.sequences == {s: context.span(s) for s in (0, 1, 3)}
        parsed = parse_context(whole, schema)
        assert parsed.to_bytes() == whole
        assert parsed.seq_ids == (0, 1, 3)
        for seq_id in range(4):
            assert parsed.extract(seq_id).to_bytes() == context.get(seq_id)
            validate_sequence(context.get(seq_id), schema, context.limits)


def test_evenly_shared_cells(native):
    context = native("dense", n_seq_max=4)
    schema = context.schema()
    context.decode(tokens(20))
    context.copy(0, 1)
    context.copy(0, 2)
    whole = context.get_all()
    assert validate_context(whole, schema, context.limits).sequences == dict.fromkeys((0, 1, 2), (0, 19))
    assert parse_context(whole, schema).to_bytes() == whole
