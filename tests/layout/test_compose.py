"""Cutting a sequence into pieces and joining them again, and moving states between kinds of context."""

from __future__ import annotations

import time

import numpy as np
import pytest

from llamastate.errors import CorruptStateError, InvalidSequenceError, LayoutMismatchError, UnsupportedLayoutError
from llamastate.layout import compose, parse_context, parse_sequence, validate_context, validate_sequence
from tests.layout.native import NAMES, Native, tokens

ATTENTION = ("dense", "qwen2vl")
CUTTABLE = tuple(n for n in NAMES if n not in ("mamba", "mamba2"))
BLOCK = 64


def nearly(a, b):
    """Equal but for the order of summation."""
    return float(np.mean((a - b) ** 2) / np.mean(b**2)) <= 1e-5 and int(a.argmax()) == int(b.argmax())


def restored_logits(name, blob, token=9, **settings):
    """Logits after one more token on top of a blob, in a context that knows nothing else."""
    with Native(name, **settings) as fresh:
        assert fresh.set(blob) == len(blob)
        return fresh.decode([token])


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", CUTTABLE)
def test_blocks_join_to_the_original(native, name, flash, unified):
    """Pieces are taken as the sequence grows, as a store of blocks would; together they are its last blob."""
    settings = {"flash": flash, "unified": unified, "n_seq_max": 2}
    context = native(name, **settings)
    schema = context.schema()
    pieces, ids = [], tokens(200)
    for start in range(0, 200, BLOCK):
        context.decode(ids[start : start + BLOCK])
        pieces.append(parse_sequence(context.get(), schema).slice(start, start + BLOCK))
    blob = context.get()
    joined = compose(pieces)
    assert joined.to_bytes() == blob
    assert compose(pieces[::-1]).to_bytes() == blob
    info = validate_sequence(joined.blob, schema, context.limits)
    assert info == validate_sequence(blob, schema, context.limits)
    assert np.array_equal(restored_logits(name, joined.to_bytes(), **settings), context.decode([9]))


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_prefix_of_the_blocks(native, name, flash):
    context = native(name, flash=flash)
    schema = context.schema()
    context.decode(tokens(200))
    state = parse_sequence(context.get(), schema)
    prefix = compose([state.slice(0, 64), state.slice(64, 130)])
    assert prefix.to_bytes() == state.slice(0, 130).to_bytes()
    assert validate_sequence(prefix.blob, schema, context.limits).pos_max == 129
    context.clear()
    context.decode(tokens(200)[:130])
    assert nearly(restored_logits(name, prefix.to_bytes(), flash=flash), context.decode([9]))


def test_slices(native):
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(100))
    state = parse_sequence(context.get(), schema)
    assert state.slice().to_bytes() == state.to_bytes()
    assert state.slice(10, 10).n_cells == 0
    assert state.slice(90, 500).base.pos.tolist() == list(range(90, 100))
    assert state.slice(10).slice(20, 30).base.pos.tolist() == list(range(20, 30))
    assert compose([state.slice(0, 0)]).to_bytes() == state.slice(0, 0).to_bytes()
    assert compose([state.slice(5, 50)]).base.pos.tolist() == list(range(5, 50))


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ["dense", "qwen2vl", "iswa", "jamba"])
def test_scattered_cells(native, name, flash):
    """Two sequences grown in turns, one of them with its end decoded again: cells neither together nor in order."""
    context = native(name, flash=flash, n_seq_max=2)
    schema = context.schema()
    for i in range(0, 60, 3):
        context.decode(tokens(60)[i : i + 3], 0)
        context.decode(tokens(60, 1)[i : i + 3], 1)
    if name != "jamba":
        context.remove(0, 45)
        context.remove(1, 0, 20)
        context.remove(1)
        context.decode(tokens(60)[45:], 0)
    blob = context.get(0)
    state = parse_sequence(blob, schema)
    assert state.to_bytes() == blob
    if name != "jamba":
        assert state.base.order is not None
    joined = compose([state.slice(30), state.slice(0, 30)]) if name in ATTENTION else compose([state])
    info = validate_sequence(joined.blob, schema, context.limits)
    assert info == validate_sequence(blob, schema, context.limits)
    assert joined.base.order is None
    rows = np.argsort(state.base.pos)
    for a, b in zip(joined.base.k, state.base.k, strict=True):
        assert np.array_equal(a, b[rows])
    for a, b in zip(joined.base.v, state.base.v, strict=True):
        assert np.array_equal(a, b[:, rows] if schema.v_trans else b[rows])
    expected = context.decode([9])
    assert nearly(restored_logits(name, joined.to_bytes(), flash=flash), expected)
    # Pieces that interleave token by token.
    odd = [state.slice(p, p + 1) for p in range(1, 60, 2)]
    even = [state.slice(p, p + 1) for p in range(0, 60, 2)]
    if name in ATTENTION:
        assert compose(odd + even).to_bytes() == joined.to_bytes()


def test_pieces_that_do_not_fit(native):
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(100))
    state = parse_sequence(context.get(), schema)
    with pytest.raises(CorruptStateError, match="missing"):
        compose([state.slice(0, 10), state.slice(11, 20)])
    with pytest.raises(CorruptStateError, match="twice"):
        compose([state.slice(0, 10), state.slice(9, 20)])
    with pytest.raises(ValueError, match="nothing"):
        compose([])
    with pytest.raises(ValueError, match="out of range"):
        compose([state], seq_id=256)
    other = native("dense", flash=False)
    theirs = other.schema()
    other.decode(tokens(20))
    with pytest.raises(LayoutMismatchError) as caught:
        compose([state.slice(0, 10), parse_sequence(other.get(), theirs).slice(10)])
    assert caught.value.field == "schema"


def test_what_cannot_be_cut(native):
    context = native("mamba")
    schema = context.schema()
    context.decode(tokens(10))
    state = parse_sequence(context.get(), schema)
    with pytest.raises(UnsupportedLayoutError):
        state.slice(0, 5)
    with pytest.raises(UnsupportedLayoutError):
        compose([state])

    context = native("jamba")
    schema = context.schema()
    context.decode(tokens(10))
    state = parse_sequence(context.get(), schema)
    with pytest.raises(UnsupportedLayoutError):
        parse_sequence(context.get(flags=1), schema, partial=True).slice(0, 5)
    assert state.slice(5).recurrent.n_cells == 1
    assert state.slice(0, 9).recurrent.n_cells == 0
    with pytest.raises(CorruptStateError, match="recurrent state at position 4"):
        compose([state.slice(0, 5)])

    context = native("iswa")
    schema = context.schema()
    context.decode(tokens(100))
    state = parse_sequence(context.get(), schema)
    with pytest.raises(CorruptStateError, match="window is empty"):
        compose([state.slice(0, 50)])
    with pytest.raises(CorruptStateError, match="incomplete"):
        compose([state.slice(0, 90)])
    assert compose([state.slice(0, 99)]).window.pos.tolist() == list(range(68, 99))


def test_a_context_gives_every_prefix_of_a_window(native):
    """The whole-context form keeps cells that a sequence blob leaves out; its window can be cut further back."""
    context = native("iswa")
    schema = context.schema()
    context.decode(tokens(100))
    whole = parse_context(context.get_all(), schema)
    assert whole.extract(0).to_bytes() == context.get()


@pytest.mark.parametrize("type_kv", [0, 1, 30])
@pytest.mark.parametrize("name", ["dense", "iswa", "jamba", "lfm2swa", "qwen35"])
def test_flash_attention_on_and_off(native, name, type_kv):
    on, off = native(name, type_kv=type_kv), native(name, flash=False, type_kv=type_kv)
    for ours, theirs in ((on, off), (off, on)):
        schema, target = ours.schema(), theirs.schema()
        ours.decode(tokens(100))
        theirs.clear()
        blob = ours.get()
        state = parse_sequence(blob, schema)
        turned = state.with_v_trans(target.v_trans)
        assert turned.schema == target
        assert turned.with_v_trans(schema.v_trans).to_bytes() == blob
        assert state.with_v_trans(schema.v_trans) is state
        data = turned.to_bytes()
        validate_sequence(data, target, theirs.limits)
        assert theirs.set(data) == len(data)
        assert theirs.get() == data
        assert nearly(theirs.decode([9]), ours.decode([9]))


def test_blocks_of_v_cannot_be_turned(native):
    context = native("dense", type_kv=8)
    schema = context.schema()
    context.decode(tokens(5))
    with pytest.raises(UnsupportedLayoutError):
        parse_sequence(context.get(), schema).with_v_trans(True)


@pytest.mark.parametrize("name", NAMES)
def test_unified_and_not(native, name):
    one, many = native(name), native(name, unified=False, n_seq_max=4)
    schema, target = one.schema(), many.schema()
    one.decode(tokens(100))
    blob = one.get()
    state = parse_sequence(blob, schema)
    moved = state.with_unified(target.n_stream, 2)
    assert moved.schema == target
    data = moved.to_bytes()
    validate_sequence(data, target, many.limits)
    assert many.set(data, 2) == len(data)
    if schema.kind != "recurrent":  # whose blobs name no sequence but in the header
        assert many.get(2) == data
    assert moved.with_unified().parts[0].n_cells == state.parts[0].n_cells
    assert parse_sequence(data, target).with_unified(1).seq_id == moved.seq_id
    assert nearly(many.decode([9], 2), one.decode([9]))
    with pytest.raises(ValueError, match="stream"):
        state.with_unified(4, 4)
    with pytest.raises(ValueError, match="n_stream"):
        state.with_unified(0)


def test_compose_into_a_buffer(native):
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(100))
    blob = context.get()
    state = parse_sequence(blob, schema)
    out = bytearray(len(blob) + 3)
    joined = compose([state.slice(0, 64), state.slice(64)], out=out)
    assert out[: len(blob)] == blob
    assert np.shares_memory(joined.blob, np.frombuffer(out, np.uint8))
    renamed = compose([state], seq_id=7)
    assert validate_sequence(renamed.blob, schema, context.limits).src_seq_id == 7


def test_extract_of_unknown_sequences(native):
    context = native("dense", unified=False, n_seq_max=4)
    schema = context.schema()
    context.decode(tokens(5), 3)
    whole = parse_context(context.get_all(), schema)
    assert whole.seq_ids == (3,)
    for bad in (-1, 4):
        with pytest.raises(InvalidSequenceError):
            whole.extract(bad)


def test_whole_contexts_restore(native):
    for name in NAMES:
        context = native(name, n_seq_max=2)
        schema = context.schema()
        for seq_id in (0, 1):
            context.decode(tokens(50, seq_id), seq_id)
        data = parse_context(context.get_all(), schema).to_bytes()
        validate_context(data, schema, context.limits)
        with Native(name, n_seq_max=2) as fresh:
            assert fresh.set_all(data) == len(data)
            for seq_id in (0, 1):
                # llama.cpp packs the cells on the way back in, and their order alone moves the last digits.
                assert nearly(fresh.decode([9], seq_id), context.decode([9], seq_id))


def test_slicing_costs_what_it_copies(native, capsys):
    """Many small slices of a long sequence, in and out of order: no pass over the sequence for each of them."""
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(500))
    state = parse_sequence(context.get(), schema)
    start = time.perf_counter()
    pieces = [state.slice(p, p + 1) for p in range(500)]
    joined = compose(pieces)
    took = time.perf_counter() - start
    assert joined.to_bytes() == state.to_bytes()
    with capsys.disabled():
        print(f"\n500 slices and their composition: {took * 1e3:.1f} ms")
