"""Damaged and foreign blobs: always a typed error, but for the few changes that leave a blob as sound as before."""

from __future__ import annotations

import contextlib
import mmap
import random
import struct

import numpy as np
import pytest

from llamastate.errors import (
    BadMagicError,
    CorruptStateError,
    LayoutMismatchError,
    LlamaStateError,
    NotEnoughCellsError,
)
from llamastate.layout import Limits, infer_schema, parse_context, parse_sequence, validate_context, validate_sequence
from tests.layout.fields import sequence_fields
from tests.layout.native import KINDS, N_VOCAB, NAMES, tokens

# What no reader of the bytes can notice, because the result is the blob of another sound state (validate.py says so).
# Everything else in a header must be noticed, whatever bit of it flips.
UNDETECTABLE = {
    ("attention", False): {"base.pos", "base.token"},
    ("iswa", False): set(),
    ("iswa", True): {"window.pos"},
    ("recurrent", False): {"header.seq_id", "recurrent.pos"},
    ("hybrid", False): {"base.token"},
    ("hybrid", True): {"header.seq_id", "recurrent.pos"},
    ("hybrid-iswa", False): set(),
    ("hybrid-iswa", True): set(),
}


@pytest.fixture(params=[(True, 1, True), (False, 4, False)], ids=["flash-unified", "streams"])
def settings(request):
    flash, n_seq_max, unified = request.param
    return {"flash": flash, "n_seq_max": n_seq_max, "unified": unified}


def blobs(context, n=6):
    """The full blob and, if it is another one, the partial one: ``(schema, partial, blob)``."""
    schema = context.schema()
    context.decode(tokens(n))
    yield schema, False, context.get()
    if schema.has_partial:
        yield schema, True, context.get(flags=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_of_every_header_field(native, settings, name):
    context = native(name, **settings)
    for schema, partial, blob in blobs(context):
        accepted = set()
        damaged = bytearray(blob)
        for field in sequence_fields(blob, schema, partial=partial):
            if field.name == "data":
                continue
            for at in range(field.start, field.end):
                for bit in range(8):
                    damaged[at] ^= 1 << bit
                    error = refusal(damaged, schema, context.limits, partial)
                    if error is None:
                        accepted.add(field.name)
                    elif isinstance(error, CorruptStateError):
                        assert error.section
                        assert error.offset is not None
                        assert 0 <= error.offset <= len(blob)
                    elif isinstance(error, LayoutMismatchError):
                        assert error.field
                        assert error.expected != error.found
                        assert error.offset is not None
                    damaged[at] ^= 1 << bit
        assert damaged == blob
        assert accepted <= UNDETECTABLE[schema.kind, partial]


def refusal(blob, schema, limits, partial=False):
    try:
        validate_sequence(blob, schema, limits, partial=partial)
    except LlamaStateError as error:
        return error
    return None


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_is_seen(native, settings, name):
    context = native(name, **settings)
    for schema, partial, blob in blobs(context):
        cuts = set(range(64))
        for field in sequence_fields(blob, schema, partial=partial):
            cuts |= {field.start, field.start + 1, (field.start + field.end) // 2, field.end - 1}
        for cut in sorted(c for c in cuts if 0 <= c < len(blob)):
            for read in (validate, parse):
                with pytest.raises(CorruptStateError) as caught:
                    read(blob[:cut], schema, context.limits, partial)
                assert caught.value.section
                assert caught.value.offset is not None
                assert caught.value.offset <= cut
        for extra in (b"\0", b"\0" * 8, blob):
            with pytest.raises(CorruptStateError) as caught:
                validate(blob + extra, schema, context.limits, partial)
            assert caught.value.section == "end"
            assert caught.value.offset == len(blob)


def validate(blob, schema, limits, partial):
    return validate_sequence(blob, schema, limits, partial=partial)


def parse(blob, schema, limits, partial):
    return parse_sequence(blob, schema, partial=partial)


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_states_of_other_models(native, name, other):
    context, foreign = native(name), native(other, n_seq_max=2)
    schema, theirs = context.schema(), foreign.schema()
    foreign.decode(tokens(40))
    if schema.parts != theirs.parts:
        with pytest.raises(LayoutMismatchError) as caught:
            validate_sequence(foreign.get(), schema, context.limits)
        assert caught.value.expected != caught.value.found
    if schema.arch != theirs.arch:
        with pytest.raises(LayoutMismatchError) as caught:
            validate_context(foreign.get_all(), schema, context.limits)
        assert (caught.value.field, caught.value.expected, caught.value.found) == ("arch", schema.arch, theirs.arch)


def test_other_settings_are_named(native):
    context = native("dense")
    schema = context.schema()
    cases = [
        ("flash_attn", native("dense", flash=False), True, False),
        ("kv_unified", native("dense", unified=False, n_seq_max=4), 1, 4),
        ("type_k", native("dense", type_kv=8), 1, 8),
        ("n_layer", native("iswa"), 4, 2),
        ("memory", native("mamba"), "base", "recurrent"),
    ]
    for field, foreign, expected, found in cases:
        foreign.decode(tokens(9))
        with pytest.raises(LayoutMismatchError) as caught:
            validate_sequence(foreign.get(), schema, context.limits)
        assert (caught.value.field, caught.value.expected, caught.value.found) == (field, expected, found)


def test_full_for_partial_and_back(native):
    for name, kind in KINDS.items():
        context = native(name)
        schema = context.schema()
        context.decode(tokens(40))
        full, part = context.get(), context.get(flags=1)
        if not schema.has_partial:
            assert full == part
            assert validate_sequence(part, schema, context.limits, partial=True).pos_max == 39
            continue
        with pytest.raises((CorruptStateError, LayoutMismatchError)):
            validate_sequence(full, schema, context.limits, partial=True)
        with pytest.raises((CorruptStateError, LayoutMismatchError)):
            validate_sequence(part, schema, context.limits)
        assert kind in ("iswa", "hybrid", "hybrid-iswa")


def test_more_cells_than_fit(native):
    context = native("iswa")
    schema = context.schema()
    context.decode(tokens(100))
    blob = context.get()
    whole = context.get_all()
    validate_sequence(blob, schema, Limits(1, 100, 32, N_VOCAB))
    for limits, needed, available in ((Limits(1, 99, 512, N_VOCAB), 100, 99), (Limits(1, 100, 31, N_VOCAB), 32, 31)):
        with pytest.raises(NotEnoughCellsError) as caught:
            validate_sequence(blob, schema, limits)
        assert (caught.value.needed, caught.value.available) == (needed, available)
    with pytest.raises(NotEnoughCellsError):
        validate_context(whole, schema, Limits(1, 99, 512, N_VOCAB))


def set_positions(blob, schema, role, change):
    """The blob with the positions of one attention cache changed."""
    data = np.frombuffer(blob, np.uint8).copy()
    state = parse_sequence(data, schema)
    part = next(p for p in state.parts if p.schema.name == role)
    at = part.cells.__array_interface__["data"][0] - data.__array_interface__["data"][0]
    cells = data[at : at + part.cells.nbytes].view(part.cells.dtype)
    cells["pos"] = change(cells["pos"].astype(np.int64))
    return data.tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p - 1, "position -1"),
        (lambda p: np.where(p == 19, 18, p), "twice"),
        (lambda p: np.where(p > 5, p + 1, p), "missing"),
        (lambda p: p * 2, "missing"),
        (lambda p: p + (2**31 - len(p)), "no room"),
    ],
)
def test_positions_that_cannot_be(native, change, said):
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(20))
    with pytest.raises(CorruptStateError, match=said) as caught:
        validate_sequence(set_positions(context.get(), schema, "base", change), schema, context.limits)
    assert caught.value.section == "base.cells"
    # Any order will do, and a sequence need not begin at 0.
    info = validate_sequence(set_positions(context.get(), schema, "base", lambda p: p[::-1]), schema, context.limits)
    assert (info.pos_min, info.pos_max) == (0, 19)
    info = validate_sequence(set_positions(context.get(), schema, "base", lambda p: p + 7), schema, context.limits)
    assert (info.pos_min, info.pos_max) == (7, 26)


def test_a_window_that_is_incomplete(native):
    """A sequence rolled back past its window: llama.cpp would save it, restore it and be wrong."""
    for name in ("iswa", "lfm2swa"):
        context = native(name)
        schema = context.schema()
        context.decode(tokens(100))
        state = parse_sequence(context.get(), schema)
        assert state.window is not None
        assert len(state.window.pos) == 32
        short = state.slice(0, 95)  # six rows fewer at the end than the window needs in front
        with pytest.raises(CorruptStateError, match=r"incomplete|recurrent|no cells"):
            validate_sequence(short.to_bytes(), schema, context.limits)

    context = native("iswa")
    schema = context.schema()
    context.decode(tokens(100))
    blob = context.get()
    context.set(blob)
    context.remove(0, 99)  # one token back is right: the window of the next still is there
    assert validate_sequence(context.get(), schema, context.limits).pos_max == 98
    context.remove(0, 98)
    with pytest.raises(CorruptStateError, match="incomplete") as caught:
        validate_sequence(context.get(), schema, context.limits)
    assert caught.value.section == "window.cells"
    with pytest.raises(CorruptStateError, match="incomplete"):
        validate_sequence(context.get(flags=1), schema, context.limits, partial=True)
    with pytest.raises(CorruptStateError, match="incomplete") as caught:
        validate_context(context.get_all(), schema, context.limits)
    assert caught.value.offset is not None
    # The same window is complete over a base that only begins there.
    start = validate_sequence(blob, schema, context.limits).pos_min
    info = validate_sequence(context.get(flags=1), schema, context.limits, partial=True, first_pos=start)
    assert (info.pos_min, info.pos_max) == (start, 97)


def test_parts_that_disagree(native):
    context = native("jamba")
    schema = context.schema()
    context.decode(tokens(10))
    with pytest.raises(CorruptStateError, match="recurrent state is at position 9"):
        validate_sequence(set_positions(context.get(), schema, "base", lambda p: p + 1), schema, context.limits)
    headless = parse_sequence(context.get(), schema).slice(0, 5)
    with pytest.raises(CorruptStateError, match="no cells"):
        validate_sequence(headless.to_bytes(), schema, context.limits)
    context = native("iswa")
    schema = context.schema()
    context.decode(tokens(10))
    with pytest.raises(CorruptStateError, match="the window ends at position 9, the base at 10"):
        validate_sequence(set_positions(context.get(), schema, "base", lambda p: p + 1), schema, context.limits)


def test_sequence_ids(native):
    context = native("dense", unified=False, n_seq_max=4)
    schema = context.schema()
    context.decode(tokens(5), 2)
    blob = context.get(2)
    assert validate_sequence(blob, schema, context.limits).src_seq_id == 2
    for bad in (-7, 300, 1, 4):
        with pytest.raises(CorruptStateError):
            validate_sequence(blob[:4] + struct.pack("<i", bad) + blob[8:], schema, context.limits)
    empty = context.get(1)
    with pytest.raises(CorruptStateError):
        validate_sequence(empty[:4] + struct.pack("<i", 9) + empty[8:], schema, context.limits)
    # All cells in another stream than their sequence's own.
    assert struct.unpack_from("<IIII", blob, 8) == (4, 0, 0, 5)
    moved = blob[:16] + blob[20:] + bytes(4)
    with pytest.raises(CorruptStateError, match="stream 1"):
        validate_sequence(moved, schema, context.limits)
    with pytest.raises(BadMagicError) as caught:
        validate_sequence(b"\1\2\3\4" + blob[4:], schema, context.limits)
    assert (caught.value.expected, caught.value.found) == (0xAF143CD8, 0x04030201)


def test_whole_context_cells(native):
    """Lists of sequence ids that llama.cpp would not have written."""
    context = native("dense", n_seq_max=4)
    schema = context.schema()
    context.decode(tokens(3))
    context.copy(0, 2)
    blob = context.get_all()
    cell = 4 + len("llama") + 8  # pos, n_seq_id = 2, 0, 2
    assert struct.unpack_from("<iIii", blob, cell) == (0, 2, 0, 2)

    def with_words(*words):
        return blob[:cell] + struct.pack("<iIii", *words) + blob[cell + 16 :]

    for words, said in (
        ((0, 2, 2, 0), "ascending"),
        ((0, 2, 0, 0), "ascending"),
        ((0, 2, 0, 4), "not in"),
        ((0, 2, -1, 2), "not in"),
        ((-1, 2, 0, 2), "position -1"),
        ((1, 2, 0, 2), "twice"),
    ):
        with pytest.raises(CorruptStateError, match=said) as caught:
            validate_context(with_words(*words), schema, context.limits)
        assert caught.value.offset is not None
        assert caught.value.section.startswith("base.cells")
    for words in ((0, 0, 0, 2), (0, 2**32 - 1, 0, 2), (0, 3, 0, 1)):
        with pytest.raises((CorruptStateError, LayoutMismatchError)):
            validate_context(with_words(*words), schema, context.limits)
    assert validate_context(blob, schema, context.limits).sequences == {0: (0, 2), 2: (0, 2)}


def test_recurrent_cells_of_a_context(native):
    context = native("mamba", n_seq_max=4)
    schema = context.schema()
    for seq_id in (0, 1):
        context.decode(tokens(5, seq_id), seq_id)
    blob = context.get_all()
    at = 4 + len("mamba")
    assert struct.unpack_from("<IiIiiIi", blob, at) == (2, 4, 1, 0, 4, 1, 1)
    twice = blob[: at + 24] + struct.pack("<i", 0) + blob[at + 28 :]
    with pytest.raises(CorruptStateError, match="one recurrent cell"):
        validate_context(twice, schema, context.limits)
    # Two cells, and a context that has only one: sequence 1 does not exist there either, and is named first.
    with pytest.raises(CorruptStateError, match="not in"):
        validate_context(blob, schema, Limits(1, 1, 1, N_VOCAB))


def test_an_error_lets_go_of_the_file(native, tmp_path):
    context = native("dense")
    schema = context.schema()
    context.decode(tokens(5))
    blob = context.get()
    file = tmp_path / "state"
    for damaged in (blob[:-1], blob[:20], blob + b"x", b"abcd" + blob[4:], blob[:12] + b"\xff" * 4 + blob[16:]):
        file.write_bytes(damaged)
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            kept = []
            for read in (
                lambda m: validate_sequence(m, schema, context.limits),
                lambda m: validate_context(m, schema, context.limits),
                lambda m: parse_sequence(m, schema),
                lambda m: parse_context(m, schema),
            ):
                with pytest.raises(LlamaStateError) as caught:
                    read(mapped)
                kept.append(caught.value)
            mapped.close()  # BufferError if an array over it were still alive


def test_arbitrary_bytes_only_raise_typed_errors(native):
    """A few thousand seeded mutations; the readers must stay within their own errors."""
    rng = random.Random(5)
    interesting = [0, 1, 2, 3, 4, 5, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE]
    accepted = 0
    for name in NAMES:
        context = native(name, n_seq_max=2)
        schema = context.schema()
        for seq_id in (0, 1):
            context.decode(tokens(12, seq_id), seq_id)
        sources = [context.get(0), context.get(1, 1), context.get_all(), context.get(0)[8:]]
        for _ in range(300):
            data = bytearray(rng.choice(sources))
            for _ in range(rng.choice((1, 1, 2, 8))):
                how = rng.randrange(5)
                at = rng.randrange(min(len(data), 400))
                if how == 0:
                    data[at] = rng.randrange(256)
                elif how == 1:
                    struct.pack_into("<I", data, at & ~3, rng.choice(interesting))
                elif how == 2:
                    del data[at : at + rng.choice((1, 4, 8, 12))]
                elif how == 3:
                    data[at:at] = rng.randbytes(rng.choice((1, 4, 12)))
                else:
                    del data[rng.randrange(len(data)) :]
                if len(data) < 8:
                    data += bytes(16)
            for read in (
                lambda d, s, c: validate_sequence(d, s, c.limits),
                lambda d, s, c: validate_sequence(d, s, c.limits, partial=True, header=False),
                lambda d, s, c: validate_sequence(d, s, c.limits, on_device=True),
                lambda d, s, c: validate_context(d, s, c.limits),
                lambda d, s, c: parse_sequence(d, s).slice(1, 7).to_bytes(),
                lambda d, s, c: parse_context(d, s).extract(1).to_bytes(),
                lambda d, s, c: infer_schema(
                    d, arch=s.arch, recurrent=False, hybrid=True, n_swa=32, swa_type="standard", m_rope=True
                ),
            ):
                with contextlib.suppress(LlamaStateError):
                    read(data, schema, context)
                    accepted += 1
    assert accepted < 8000  # of 21,000: the fuzzer does reach the errors
    noise = np.random.default_rng(0)
    for size in (0, 1, 3, 4, 7, 8, 11, 12, 15, 16, 17, 100, 4096):
        data = noise.integers(0, 256, size, dtype=np.uint8)
        for read in (parse, validate):
            with pytest.raises(LlamaStateError):
                read(data, schema, context.limits, False)
