"""The one walk over a blob that parsing and validating share.

It answers "where is what" and checks everything that decides where the next thing is: counts, layer headers, sizes.
What the positions and sequence ids *mean* is checked in :mod:`llamastate.layout.validate`.

The layers are compared with the schema's table of expected header bytes, so a layer costs one comparison of twelve
bytes; only when that fails is the header taken apart to say which field differs.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from llamastate._native import consts
from llamastate.errors import BadMagicError, LayoutMismatchError
from llamastate.layout.cursor import Cursor
from llamastate.layout.known import what_is
from llamastate.layout.schema import MAX_SEQ, KVSchema, RecurrentSchema, Schema, Tensor

__all__ = ["SEQUENCE_MAGIC", "Cells", "ContextWalk", "SequenceWalk", "Span", "walk_context", "walk_sequence"]

SEQUENCE_MAGIC = 0xAF143CD8
"""First word of a sequence blob in memory (``io_magic`` in llama-context.cpp). Files carry none."""

_MAX_ARCH_BYTES = 256

_TYPE_NAMES = {number: name for name, number in consts.CACHE_TYPES.items()}

_TYPE_ROW = Struct("<iQ")
_TYPE_ELEMENT_COUNT = Struct("<iII")
_TWO_U32 = Struct("<II")
_U32 = Struct("<I")


class Cells(NamedTuple):
    """The cell records of one stream, as views.

    Parameters
    ----------
    at, end : int
        The bytes of the records.
    pos : int32[n]
        Position of each cell.
    ext : int32[n, 3] or None
        x, y and token of each cell.
    counts : int32[n]
        How many sequences each cell belongs to.
    ids : int32[sum(counts)]
        Their ids, cell after cell.
    offsets : int64[n] or None
        Where each record begins, if they differ in size.
    """

    at: int
    end: int
    pos: NDArray[np.int32]
    ext: NDArray[np.int32] | None
    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    offsets: NDArray[np.int64] | None = None

    def where(self, i: int) -> int:
        """Offset of the record of cell ``i``."""
        if self.offsets is not None:
            return int(self.offsets[i])
        return self.at + i * ((self.end - self.at) // len(self.pos))

    def owners(self) -> NDArray[np.int64]:
        """For each entry of ``ids``, the cell it stands in: ``int64[len(ids)]``."""
        return np.repeat(np.arange(len(self.pos)), self.counts)


class Span(NamedTuple):
    """One part (of one stream) of a blob: its cells and where its layers begin and end."""

    part: KVSchema | RecurrentSchema
    stream: int
    cells: Cells
    data: int
    end: int

    @property
    def n_cells(self) -> int:
        """How many cells."""
        return len(self.cells.pos)


class SequenceWalk(NamedTuple):
    """What :func:`walk_sequence` found.

    ``spans`` holds one entry for each part of the blob, in order; ``None`` where an attention cache holds no cell.
    ``starts`` says where each part begins.
    """

    seq_id: int | None
    spans: tuple[Span | None, ...]
    starts: tuple[int, ...]
    end: int


class ContextWalk(NamedTuple):
    """What :func:`walk_context` found.

    ``parts`` holds for each part the streams that have cells; the recurrent part always has one span. ``starts`` says
    where each part begins.
    """

    arch: str
    parts: tuple[tuple[Span, ...], ...]
    starts: tuple[int, ...]
    end: int


def walk_sequence(
    view: memoryview, schema: Schema, *, partial: bool = False, on_device: bool = False, header: bool = True
) -> SequenceWalk:
    """Find every part of a sequence blob (``llama_context::state_seq_write_data``).

    Cost: O(layers), plus one pass over the cells' counts. Tensor bytes are not read.

    Raises
    ------
    BadMagicError
        Another first word.
    LayoutMismatchError
        Sound bytes of another layout; ``field`` says what differs.
    CorruptStateError
        Truncated, trailing bytes, or counts that cannot be.
    """
    cursor = Cursor(view)
    seq_id = None
    if header:
        magic = cursor.u32("header.magic")
        if magic != SEQUENCE_MAGIC:
            known = what_is(bytes(view[:68]))
            problem = (
                f"it begins with {magic:#010x}, not {SEQUENCE_MAGIC:#010x}" if known is None else f"this is {known}"
            )
            raise BadMagicError(
                f"not the state of a sequence: {problem}",
                reason=problem,
                expected=SEQUENCE_MAGIC,
                found=magic,
            )
        seq_id = cursor.i32("header.seq_id")
        if not 0 <= seq_id < MAX_SEQ:
            cursor.fail("header.seq_id", f"sequence id {seq_id} is not in [0, {MAX_SEQ})", offset=4)
    spans: list[Span | None] = []
    starts: list[int] = []
    for part in schema.parts_of(partial):
        starts.append(cursor.at)
        if isinstance(part, KVSchema):
            streams = _walk_kv(cursor, part, one_id=True, on_device=on_device)
            if len(streams) > 1:
                cursor.fail(f"{part.name}.n_cells", "more than one stream holds cells", offset=streams[1].cells.at - 4)
            spans.append(streams[0] if streams else None)
        else:
            spans.append(_walk_recurrent(cursor, part, n_ids=0, on_device=on_device))
    _end(cursor)
    return SequenceWalk(seq_id, tuple(spans), tuple(starts), cursor.at)


def walk_context(view: memoryview, schema: Schema) -> ContextWalk:
    """Find every part of a whole-context blob (``llama_context::state_write_data``).

    Raises
    ------
    LayoutMismatchError, CorruptStateError
        As :func:`walk_sequence`.
    """
    cursor = Cursor(view)
    length = cursor.u32("header.arch")
    if length > _MAX_ARCH_BYTES and (known := what_is(bytes(view[:4]))) is not None:
        cursor.fail("header.arch", f"this is {known}", offset=0)
    if length > _MAX_ARCH_BYTES:
        cursor.fail("header.arch", f"an architecture name of {length} bytes", offset=0)
    at = cursor.claim(length, "header.arch")
    arch = bytes(view[at : at + length]).decode("utf-8", "replace")
    if arch != schema.arch:
        raise LayoutMismatchError(
            f"the state is of a {arch!r} model, not {schema.arch!r}",
            field="arch",
            expected=schema.arch,
            found=arch,
            offset=at,
        )
    parts: list[tuple[Span, ...]] = []
    starts: list[int] = []
    for part in schema.parts:
        starts.append(cursor.at)
        if isinstance(part, KVSchema):
            parts.append(tuple(_walk_kv(cursor, part, one_id=False, on_device=False)))
        else:
            parts.append((_walk_recurrent(cursor, part, n_ids=None, on_device=False),))
    _end(cursor)
    return ContextWalk(arch, tuple(parts), tuple(starts), cursor.at)


def _end(cursor: Cursor) -> None:
    if cursor.at != cursor.size:
        cursor.fail("end", f"{cursor.size - cursor.at} bytes follow the end of the state")


def _walk_kv(cursor: Cursor, part: KVSchema, *, one_id: bool, on_device: bool) -> list[Span]:
    """One attention cache; a span for each stream that holds cells."""
    name = part.name
    n_stream = cursor.u32(f"{name}.n_stream")
    if n_stream != part.n_stream:
        _mismatch("kv_unified", part.n_stream, n_stream, cursor.at - 4, f"{name} cache: number of streams")
    spans: list[Span] = []
    for stream in range(n_stream):
        n_cells = cursor.u32(f"{name}.n_cells")
        if not n_cells:
            continue
        cells = read_cells(cursor, n_cells, part.has_ext, 1 if one_id else None, f"{name}.cells")
        at = cursor.claim(8, f"{name}.preamble")
        if cursor.view[at : cursor.at] != part.preamble:
            _explain_kv_preamble(cursor, part, at)
        data = cursor.at
        _walk_tensors(cursor, n_cells, part, on_device)
        spans.append(Span(part, stream, cells, data, cursor.at))
    return spans


def _walk_recurrent(cursor: Cursor, part: RecurrentSchema, *, n_ids: int | None, on_device: bool) -> Span:
    """The recurrent part, which is written in full even without cells."""
    n_cells = cursor.u32("recurrent.n_cells")
    if n_ids == 0 and n_cells > 1:
        cursor.fail("recurrent.n_cells", f"a sequence has one recurrent cell, not {n_cells}", offset=cursor.at - 4)
    cells = read_cells(cursor, n_cells, False, n_ids, "recurrent.cells")
    at = cursor.claim(8, "recurrent.preamble")
    if cursor.view[at : cursor.at] != part.preamble:
        s_trans, n_layer = _TWO_U32.unpack_from(cursor.view, at)
        if s_trans:
            cursor.fail("recurrent.s_trans", f"s_trans is {s_trans}; llama.cpp only knows 0", offset=at)
        _mismatch("n_layer", part.n_layer, n_layer, at + 4, "recurrent state: number of layers")
    data = cursor.at
    _walk_tensors(cursor, n_cells, part, on_device)
    return Span(part, 0, cells, data, cursor.at)


def read_cells(cursor: Cursor, n_cells: int, has_ext: bool, n_ids: int | None, section: str) -> Cells:
    """The records of ``n_cells`` cells, each with ``n_ids`` sequence ids, or with any number if that is None.

    Cost: vectorised while all records have one size, as they have in sequence blobs and whenever no cell is shared;
    about 0.2 µs a cell otherwise.
    """
    head = 5 if has_ext else 2  # words before the ids
    at = cursor.at
    if not n_cells:
        none = np.empty(0, np.int32)
        return Cells(at, at, none, none.reshape(0, 3) if has_ext else None, none, none)
    uniform = n_ids
    if n_cells * 4 * (head + (n_ids or 0)) > cursor.remaining:
        cursor.truncated(section, n_cells * 4 * (head + (n_ids or 0)))
    if uniform is None:
        uniform = int(_U32.unpack_from(cursor.view, at + 4)[0])
    size = head + uniform
    if uniform <= MAX_SEQ and 4 * n_cells * size <= cursor.remaining:
        words = np.frombuffer(cursor.view, "<i4", n_cells * size, at).reshape(n_cells, size)
        counts = words[:, 1]
        if bool((counts == uniform).all()):
            cursor.at = at + 4 * n_cells * size
            ext = words[:, 2:5] if has_ext else None
            # One contiguous copy of the positions pays for itself in the checks that follow.
            return Cells(at, cursor.at, words[:, 0].copy(), ext, counts, words[:, head:].reshape(-1))
        if n_ids is not None:
            i = int((counts != n_ids).argmax())
            found = int(counts[i]) & 0xFFFFFFFF
            cursor.fail(section, f"cell {i} lists {found} sequences, not {n_ids}", offset=at + i * 4 * size + 4)
    return _read_mixed_cells(cursor, n_cells, head, section)


def _read_mixed_cells(cursor: Cursor, n_cells: int, head: int, section: str) -> Cells:
    """Records of different sizes: each one's count says where the next begins."""
    view, start, size = cursor.view, cursor.at, cursor.size
    unpack = _U32.unpack_from
    offsets: list[int] = []
    at = start
    for i in range(n_cells):
        if at + 4 * head > size:
            cursor.at = at
            cursor.truncated(section, 4 * head)
        count = unpack(view, at + 4)[0]
        if count > MAX_SEQ:
            cursor.fail(section, f"cell {i} lists {count} sequences", offset=at + 4)
        offsets.append(at)
        at += 4 * (head + count)
    cursor.claim(at - start, section)
    words = np.frombuffer(view, "<i4", (at - start) // 4, start)
    where = np.array(offsets, np.int64)
    first = (where - start) // 4
    is_id = np.ones(len(words), np.bool_)
    for j in range(head):
        is_id[first + j] = False
    ext = words[first[:, None] + np.arange(2, 5)] if head == 5 else None
    return Cells(start, at, words[first], ext, words[first + 1], words[is_id], where)


def _walk_tensors(cursor: Cursor, n_cells: int, part: KVSchema | RecurrentSchema, on_device: bool) -> None:
    """Step over all layers, comparing each header with the expected bytes."""
    view = cursor.view
    at = cursor.at
    rows = 0 if on_device else n_cells
    for tensor in part.tensors:
        data = at + len(tensor.header)
        if view[at:data] != tensor.header:
            cursor.at = at
            _explain_tensor(cursor, part, tensor)
        at = data + rows * tensor.cell_bytes
    cursor.at = at
    if at > cursor.size:
        cursor.fail(f"{part.name}.data", f"truncated: the last layer ends at byte {at}, the buffer at {cursor.size}")


def _explain_tensor(cursor: Cursor, part: KVSchema | RecurrentSchema, tensor: Tensor) -> NoReturn:
    """Say why the bytes at the cursor are not this layer's header."""
    section = f"{part.name}.{tensor.kind}[{tensor.layer}]"
    if cursor.at > cursor.size:
        cursor.fail(section, f"truncated: this layer begins at byte {cursor.at}, the buffer ends at {cursor.size}")
    at = cursor.claim(len(tensor.header), section)
    letter = tensor.kind.lower()
    what = f"{part.name} {tensor.kind} of layer {tensor.layer}"
    if tensor.columns:
        names = (f"type_{letter}", f"element_{letter}", f"n_embd_{letter}")
        expected: tuple[int, ...] = _TYPE_ELEMENT_COUNT.unpack(tensor.header)
        found: tuple[int, ...] = _TYPE_ELEMENT_COUNT.unpack_from(cursor.view, at)
        steps = (0, 4, 8)
    else:
        names = (f"type_{letter}", f"row_{letter}", "")
        expected = _TYPE_ROW.unpack(tensor.header)
        found = _TYPE_ROW.unpack_from(cursor.view, at)
        steps = (0, 4, 0)
    for name, want, got, step in zip(names, expected, found, steps, strict=False):
        if want != got:
            _mismatch(name, want, got, at + step, what)
    raise AssertionError("the header differs, so one of its fields does")  # pragma: no cover


def _explain_kv_preamble(cursor: Cursor, part: KVSchema, at: int) -> NoReturn:
    v_trans, n_layer = _TWO_U32.unpack_from(cursor.view, at)
    if v_trans > 1:
        cursor.fail(f"{part.name}.v_trans", f"v_trans is {v_trans}, neither 0 nor 1", offset=at)
    if n_layer != len(part.k):
        _mismatch("n_layer", len(part.k), n_layer, at + 4, f"{part.name} cache: number of layers")
    # llama.cpp transposes V exactly when flash attention is off, and that is the setting people know.
    expected, found = not part.v_trans, not v_trans
    message = (
        f"the state was taken with flash attention {_on(found)}, this context has it {_on(expected)}: V lies the other "
        "way round"
    )
    raise LayoutMismatchError(message, field="flash_attn", expected=expected, found=found, offset=at)


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _mismatch(field: str, expected: object, found: object, offset: int, what: str) -> NoReturn:
    if field.startswith("type_"):
        said = [str(_TYPE_NAMES.get(number, f"ggml type {number}")) for number in (found, expected)]  # type: ignore[call-overload]
    else:
        said = [str(found), str(expected)]
    raise LayoutMismatchError(
        f"the state is of another layout: {what} is {said[0]}, this context has {said[1]}",
        field=field,
        expected=expected,
        found=found,
        offset=offset,
    )
