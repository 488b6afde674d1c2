"""Damaged, foreign and oversized states: which error, with what in it, and that nothing has changed."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamastate import (
    BadMagicError,
    CorruptStateError,
    InsufficientMaxTokensError,
    LayoutMismatchError,
    LoadError,
    NotEnoughCellsError,
    OnDeviceStateError,
    SeqFlags,
    UnsupportedLayoutError,
    VersionMismatchError,
    errors,
)
from llamastate.layout import KVSchema
from llamastate.layout.walk import walk_context
from tests.bad import Pair, pair
from tests.fuzz.mutate import Blob, context_headers
from tests.fuzz.world import Case, Settings, World, apply, check_world
from tests.helpers import KINDS, context, model, tokens
from tests.layout.fields import sequence_fields

MAGIC = 0xAF143CD8
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=[("on", True), ("off", False)], ids=["flash-unified", "streams"])
def world(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Iterator[World]:
    flash_attn, unified = request.param
    found = World(Settings(kind, flash_attn, 4, unified), tmp_path)
    yield found
    check_world(found)
    found.close()


def feed(world: World, path: str, data: bytes) -> str:
    flags = SeqFlags.PARTIAL_ONLY if path == "partial" else SeqFlags.NONE
    return apply(world, Case(path, data, 0, flags, "by hand"))


# --- cut short --------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("path", ["sequence", "partial", "whole", "sequence file", "context file"])
def test_every_class_of_cut(world: World, path: str):
    """At each border of a section, one byte before and after it, and at regular distances."""
    for source in world.sources[path][:2]:
        size = len(source.data)
        borders = [at for at, following in itertools.pairwise([-1, *source.headers, size]) if following != at + 1]
        starts = [at for before, at in itertools.pairwise([-2, *source.headers, size]) if at != before + 1]
        words = source.headers[:: max(4, len(source.headers) // 60 // 4 * 4)]
        near = {at + d for at in (*borders, *starts, *words) for d in (-1, 0, 1)}
        for cut in sorted({at for at in near | set(range(0, size, max(1, size // 40))) if 0 <= at < size}):
            assert feed(world, path, source.data[:cut]) == "CorruptStateError", cut
        for more in (b"\0", bytes(8), source.data[:100]):
            assert feed(world, path, source.data + more) == "CorruptStateError"


def test_what_a_cut_says(tmp_path: Path):
    with pair("iswa") as p:
        blob = p.ctx.state_seq_get_data(0).tobytes()
        with p.refuses(CorruptStateError, path=None, offset=len(blob) - 1) as caught:
            p.ctx.state_seq_set_data(blob[:-1], 0)
        assert caught[0].section.startswith("window")
        assert "truncated" in caught[0].reason
        with p.refuses(CorruptStateError, offset=len(blob), section="end"):
            p.ctx.state_seq_set_data(blob + b"x", 0)
        with p.refuses(CorruptStateError, offset=0):
            p.ctx.state_seq_set_data(b"", 0)
        file = tmp_path / "state"
        p.ctx.state_seq_save_file(file, 0, tokens(40, seed=1))
        data = file.read_bytes()
        for cut, section in ((2, "file.magic"), (6, "file.version"), (10, "file.n_tokens"), (50, "file.n_tokens")):
            (tmp_path / "cut").write_bytes(data[:cut])
            with p.refuses(CorruptStateError, path=str(tmp_path / "cut"), section=section):
                p.ctx.state_seq_load_file(tmp_path / "cut", 0)


# --- one bit ----------------------------------------------------------------------------------------------------------

#: Fields that nothing else in the blob contradicts: a state with another value in them is as sound as before. That is
#: the position of a lone cell or of a recurrent state, a cell of the run's one end put at the other, the end of a
#: partial window, the token of an M-RoPE cell; and the sequence id where no cell repeats it.
FREE = {
    "attention": {"base.pos", "base.token"},
    "iswa": {"window.pos"},
    "recurrent": {"header.seq_id", "recurrent.pos"},
    "hybrid": {"base.token", "recurrent.pos", "header.seq_id"},
    "hybrid-iswa": {"recurrent.pos", "header.seq_id"},
}


@each_kind
@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
def test_every_bit_of_every_header_field(world: World, partial: bool):
    schema = world.ctx.schema
    path = "partial" if partial else "sequence"
    source = world.sources[path][0].data
    fields = [f for f in sequence_fields(source, schema, partial=partial and schema.has_partial) if f.name != "data"]
    taken = set()
    damaged = bytearray(source)
    for field in fields:
        for at, bit in itertools.product(range(field.start, field.end), range(8)):
            damaged[at] ^= 1 << bit
            # Everything that apply() looks at holds in either case: the state is what the bytes say, or as it was.
            outcome = feed(world, path, bytes(damaged))
            damaged[at] ^= 1 << bit
            if outcome == "accepted":
                taken.add(field.name)
            elif field.name == "header.magic":
                assert outcome == "BadMagicError"
            else:
                assert issubclass(getattr(errors, outcome), LoadError)
    assert taken <= FREE[schema.kind]


@each_kind
def test_every_bit_of_a_context_header(world: World):
    """Of a whole context every header bit is damaged that the words in ``free`` do not cover, and is noticed."""
    source = world.sources["whole"][0]
    free = set(free_in_context(world))
    damaged = bytearray(source.data)
    rng = random.Random(1)
    for at in source.headers:
        if at in free:
            continue
        bit = rng.randrange(8)
        damaged[at] ^= 1 << bit
        outcome = feed(world, "whole", bytes(damaged))
        damaged[at] ^= 1 << bit
        assert outcome in ("CorruptStateError", "LayoutMismatchError", "NotEnoughCellsError"), (at, bit)


def free_in_context(world: World) -> Iterator[int]:
    """Offsets of positions, of M-RoPE's tokens, of the owners of recurrent cells: another value may be as sound."""
    for spans in walk_context(memoryview(world.sources["whole"][0].data), world.ctx.schema).parts:
        for span in spans:
            at = span.cells.at
            for count in span.cells.counts.tolist():
                yield from range(at, at + 4)
                head = 8
                if isinstance(span.part, KVSchema) and span.part.has_ext:
                    head = 20
                    yield from range(at + 16, at + 20)
                if span.part.name == "recurrent":
                    yield from range(at + 4, at + head + 4 * count)
                at += head + 4 * count


@each_kind
def test_every_bit_of_a_file_header(world: World):
    for path, magic in (("sequence file", 0x67677371), ("context file", 0x6767736E)):
        source = world.sources[path][0].data
        assert struct.unpack_from("<I", source)[0] == magic
        for at, bit in itertools.product(range(12 + 4 * 5), range(8)):
            damaged = bytearray(source)
            damaged[at] ^= 1 << bit
            outcome = feed(world, path, bytes(damaged))
            if at < 4:
                assert outcome == "BadMagicError"
            elif at < 8:
                assert outcome == "VersionMismatchError"
            elif at < 12:
                assert issubclass(getattr(errors, outcome), LoadError)
            elif at % 4 == 0:
                assert outcome == "accepted"  # another token, of 256; nothing vouches for it
            else:
                assert outcome == "CorruptStateError"


def test_what_a_file_header_says(tmp_path: Path):
    with pair("dense") as p:
        file = tmp_path / "state"
        p.ctx.state_seq_save_file(file, 0, [1, 2, 3])
        data = file.read_bytes()

        def load(changed: bytes, **options: Any) -> None:
            file.unlink()
            file.write_bytes(changed)
            p.ctx.state_seq_load_file(file, 1, **options)

        with p.refuses(BadMagicError, path=str(file), expected=0x67677371, found=0x6767736E):
            load(b"nsgg" + data[4:])
        with p.refuses(VersionMismatchError, path=str(file), expected=3, found=4):
            load(data[:4] + b"\4\0\0\0" + data[8:])
        with p.refuses(CorruptStateError, path=str(file), offset=16, section="tokens"):
            load(data[:16] + struct.pack("<i", 256) + data[20:])
        with p.refuses(CorruptStateError, path=str(file), offset=12, section="tokens"):
            load(data[:12] + struct.pack("<i", -1) + data[16:])
        with p.refuses(InsufficientMaxTokensError, path=str(file), n_out=3, max_tokens=2):
            load(data, max_tokens=2)
        p.ctx.state_save_file(file, [1, 2, 3])
        with p.refuses(InsufficientMaxTokensError, path=str(file), n_out=3, max_tokens=0):
            p.ctx.state_load_file(file, max_tokens=0)
        with p.refuses(BadMagicError, path=str(file), expected=0x67677371, found=0x6767736E):
            p.ctx.state_seq_load_file(file, 1)


# --- noise ------------------------------------------------------------------------------------------------------------


@each_kind
def test_random_bytes(world: World):
    rng = random.Random(7)
    for size in (0, 1, 3, 4, 7, 8, 11, 12, 16, 20, 24, 64, 1000, 20_000):
        for front in (b"", struct.pack("<Ii", MAGIC, 0), world.sources["whole"][0].data[:12], b"ggsn", b"ggsq"):
            for path in ("sequence", "partial", "whole", "sequence file", "context file"):
                outcome = feed(world, path, front + rng.randbytes(size))
                assert issubclass(getattr(errors, outcome), LoadError)


# --- sound, but not for this context ----------------------------------------------------------------------------------


@each_kind
def test_states_of_other_models(kind: str):
    for other in KINDS:
        with context(other, n_seq_max=4) as foreign, pair(kind) as p:
            if foreign.schema.parts == p.ctx.schema.parts:
                continue
            foreign.decode(tokens(12), seq_id=0)
            with p.refuses(LayoutMismatchError) as caught:
                p.ctx.state_seq_set_data(foreign.state_seq_get_data(0), 0)
            assert caught[0].field
            assert caught[0].expected != caught[0].found
            with p.refuses(LayoutMismatchError):
                p.ctx.state_set_data(foreign.state_get_data())


def test_other_weights_in_the_same_shape_are_not_told_apart_by_a_blob():
    """No blob says whose it is: that is what snapshots are for. It is taken, and is what it says."""
    with context(model("dense", seed=1)) as foreign, context("dense") as ctx:
        foreign.decode(tokens(12))
        blob = foreign.state_seq_get_data(0)
        ctx.state_seq_set_data(blob, 0)
        assert ctx.state_seq_get_data(0).tobytes() == blob.tobytes()


SETTINGS = [
    ({"flash_attn": "on"}, {"flash_attn": "off"}, "flash_attn", True, False),
    ({"flash_attn": "off"}, {"flash_attn": "on"}, "flash_attn", False, True),
    ({"kv_unified": True}, {"kv_unified": False}, "kv_unified", 1, 4),
    ({"kv_unified": False}, {"kv_unified": True}, "kv_unified", 4, 1),
    ({"type_k": "f16"}, {"type_k": "q8_0"}, "type_k", 1, 8),
    ({"flash_attn": "on", "type_v": "f16"}, {"flash_attn": "on", "type_v": "f32"}, "type_v", 1, 0),
]


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "lfm2swa", "qwen2vl"])
@pytest.mark.parametrize(("own", "others", "field", "expected", "found"), SETTINGS, ids=[s[2] for s in SETTINGS])
def test_other_settings(kind: str, own: Any, others: Any, field: str, expected: Any, found: Any):
    with pair(kind, **own) as p, context(kind, n_seq_max=4, **others) as foreign:
        foreign.decode(tokens(12), seq_id=0)
        with p.refuses(LayoutMismatchError, field=field, expected=expected, found=found):
            p.ctx.state_seq_set_data(foreign.state_seq_get_data(0), 0)
        with p.refuses(LayoutMismatchError, field=field, expected=expected, found=found):
            p.ctx.state_set_data(foreign.state_get_data())


@pytest.mark.parametrize("kind", ["iswa", "jamba", "lfm2swa"])
def test_full_states_for_partial_ones_and_back(kind: str):
    with pair(kind) as p:
        full, part = p.ctx.state_seq_get_data(0), p.ctx.state_seq_get_data(0, SeqFlags.PARTIAL_ONLY)
        for blob, flags in ((full, SeqFlags.PARTIAL_ONLY), (part, SeqFlags.NONE)):
            with pytest.raises((CorruptStateError, LayoutMismatchError)), p.unchanged():
                p.ctx.state_seq_set_data(blob, 0, flags)


@pytest.mark.parametrize("kind", ["iswa", "jamba", "lfm2", "qwen35"])
def test_a_partial_state_for_a_sequence_that_is_too_short(kind: str):
    with pair(kind) as p:
        part = p.ctx.state_seq_get_data(0, SeqFlags.PARTIAL_ONLY)
        for seq in (1, 2):  # 9 tokens, and none
            with p.refuses(LoadError, reason="the sequence is shorter than the partial state"):
                p.ctx.state_seq_set_data(part, seq, SeqFlags.PARTIAL_ONLY)


# --- too much ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "qwen2vl"])
def test_a_sequence_larger_than_the_cache(kind: str, tmp_path: Path):
    with context(kind, n_ctx=512) as large, pair(kind, n_ctx=256, n_seq_max=1) as p:
        large.prefill(tokens(300))
        large.state_seq_save_file(tmp_path / "state", 0, [])
        for call in (
            lambda: p.ctx.state_seq_set_data(large.state_seq_get_data(0), 0),
            lambda: p.ctx.state_set_data(large.state_get_data()),
            lambda: p.ctx.state_seq_load_file(tmp_path / "state", 0),
        ):
            with p.refuses(NotEnoughCellsError, needed=300, available=256):
                call()


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "lfm2", "qwen2vl", "qwen35"])
@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_a_sequence_that_others_leave_no_room_for(kind: str, flash_attn: str, tmp_path: Path):
    with context(kind, n_ctx=256, flash_attn=flash_attn) as large:
        large.prefill(tokens(220))
        blob = large.state_seq_get_data(0)
        large.state_seq_save_file(tmp_path / "state", 0, [])
    with pair(kind, n_ctx=256, flash_attn=flash_attn) as p:
        # 40 and 9 cells of 256 are taken; those of the destination become free
        for dest, available in ((0, 247), (1, 216), (2, 207), (3, 207)):
            if available >= 220:
                continue
            with p.refuses(NotEnoughCellsError, needed=220, available=available, path=None):
                p.ctx.state_seq_set_data(blob, dest)
            with p.refuses(NotEnoughCellsError, needed=220, available=available, path=str(tmp_path / "state")):
                p.ctx.state_seq_load_file(tmp_path / "state", dest)


def test_a_destination_whose_cells_are_shared():
    """Emptying it frees nothing; what it held comes back with the cells still shared."""
    with context("dense", n_ctx=256) as large:
        large.prefill(tokens(150))
        blob = large.state_seq_get_data(0)
    with context("dense", n_ctx=256, n_seq_max=3) as ctx:
        ctx.prefill(tokens(120, seed=3), seq_id=0)
        ctx.seq_cp(0, 1)
        before = ctx.state_get_data().tobytes()
        with pytest.raises(NotEnoughCellsError) as caught:
            ctx.state_seq_set_data(blob, 1)
        assert (caught.value.needed, caught.value.available) == (150, 136)
        assert ctx.state_get_data().tobytes() == before
        ctx.prefill(tokens(136, seed=4), seq_id=2)  # there is as much room as before


def test_a_destination_beside_one_with_more_cells_than_positions():
    with context("dense", n_ctx=256) as large:
        large.prefill(tokens(150))
        blob = large.state_seq_get_data(0)
    with context("dense", n_ctx=256, n_seq_max=2) as ctx:
        ctx.prefill(tokens(20, seed=3), seq_id=0)
        ctx.prefill(tokens(200, seed=4), seq_id=1)
        ctx.seq_div(1, 0, -1, 4)
        ctx.decode([5], seq_id=1)
        assert ctx.seq_pos_max(1) == 50
        before = ctx.state_seq_get_data(0).tobytes()
        with pytest.raises(NotEnoughCellsError) as caught:
            ctx.state_seq_set_data(blob, 0)
        assert (caught.value.needed, caught.value.available) == (150, 55)
        assert ctx.state_seq_get_data(0).tobytes() == before


# --- ON_DEVICE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba", "lfm2swa", "qwen2vl"])
@pytest.mark.parametrize("flags", [SeqFlags.ON_DEVICE, SeqFlags.ON_DEVICE | SeqFlags.PARTIAL_ONLY])
def test_device_states_that_are_not_the_last(kind: str, flags: SeqFlags):
    with pair(kind, flash_attn="on") as p, context(kind, n_seq_max=4, flash_attn="on") as other:
        other.decode(tokens(40, seed=1), seq_id=0)
        foreign = other.state_seq_get_data(0, flags)
        with p.refuses(OnDeviceStateError, reason="never taken", seq_id=0):
            p.ctx.state_seq_set_data(foreign, 0, flags)
        for short in (b"", b"\0" * 7):
            with p.refuses(OnDeviceStateError, reason="never taken", seq_id=None):
                p.ctx.state_seq_set_data(short, 0, flags)
        older = p.ctx.state_seq_get_data(1, flags)
        p.ctx.decode([1], seq_id=1)
        latest = p.ctx.state_seq_get_data(1, flags)
        p.twin.decode([1], seq_id=1)
        last = {"reason": "not the last one taken", "seq_id": 1}
        with p.refuses(OnDeviceStateError, **last):
            p.ctx.state_seq_set_data(older, 1, flags)
        with p.refuses(OnDeviceStateError, **last):
            p.ctx.state_seq_set_data(latest, 1, flags ^ SeqFlags.PARTIAL_ONLY)
        for at, bit in itertools.product(range(4, len(latest)), range(8)):
            damaged = latest.copy()
            damaged[at] ^= 1 << bit
            with pytest.raises(OnDeviceStateError):
                p.ctx.state_seq_set_data(damaged, 1, flags)
        with p.refuses(OnDeviceStateError, **last):
            p.ctx.state_seq_set_data(latest[:-1], 1, flags)
        p.ctx.state_seq_set_data(latest, 1, flags)


def test_a_device_state_is_no_other():
    with pair("dense", flash_attn="on") as p:
        blob = p.ctx.state_seq_get_data(0, SeqFlags.ON_DEVICE)
        with p.refuses(CorruptStateError):
            p.ctx.state_seq_set_data(blob, 0)
        with p.refuses(OnDeviceStateError, reason="not the last one taken", seq_id=0):
            p.ctx.state_seq_set_data(p.ctx.state_seq_get_data(0), 0, SeqFlags.ON_DEVICE)


def test_a_device_state_of_a_cache_of_blocks():
    """Of which llama.cpp would keep one byte in 32, and say that all is well."""
    facts = {"reason": "on_device of a block type", "kind": "attention"}
    with pair("dense", type_k="q8_0", flash_attn="on") as p, p.refuses(UnsupportedLayoutError, **facts):
        p.ctx.state_seq_get_data(0, SeqFlags.ON_DEVICE)


def test_a_device_state_in_a_storage_that_is_too_small():
    """Taken again with as many bytes, but in more stretches of cells: llama.cpp would abort."""
    with context("dense", flash_attn="off", n_seq_max=3) as ctx:
        for at in range(0, 12, 3):
            ctx.decode(tokens(3, seed=at), seq_id=0)
        first = ctx.state_seq_get_data(0, SeqFlags.ON_DEVICE)
        ctx.state_seq_set_data(first, 0, SeqFlags.ON_DEVICE)
        ctx.clear()
        for _ in range(12):
            ctx.decode([1], seq_id=0)
            ctx.decode([2], seq_id=1)
        with pytest.raises(OnDeviceStateError) as caught:
            ctx.state_seq_get_data(0, SeqFlags.ON_DEVICE)
        assert (caught.value.reason, caught.value.seq_id) == ("same size in other cells", 0)
        ctx.decode([1], seq_id=0)
        blob = ctx.state_seq_get_data(0, SeqFlags.ON_DEVICE)
        held = ctx.state_seq_get_data(0).tobytes()
        ctx.seq_rm(0)
        ctx.state_seq_set_data(blob, 0, SeqFlags.ON_DEVICE)
        assert ctx.seq_pos_max(0) == 12
        assert len(ctx.state_seq_get_data(0)) == len(held)


def test_headers_of_a_context_are_found():
    """That the tests above damage what they mean to."""
    p = Pair("dense")
    blob = p.ctx.state_get_data().tobytes()
    source = Blob(blob, context_headers(blob, p.ctx.schema))
    n_tensors = len(p.ctx.schema.parts[0].tensors)
    assert len(source.headers) == 4 + len("llama") + 8 + 49 * 12 + 8 + 12 * n_tensors
    p.close()
