"""Refusing every blob that llama.cpp would accept and be wrong with, abort on, or half restore.

llama.cpp checks types and sizes while it already writes into the cache, and hardly anything else. So everything is
checked here first: the structure by :mod:`llamastate.layout.walk`, positions by :mod:`llamastate.layout.positions`,
sequence ids and how the parts agree below.

What no check of the bytes alone can see, because the changed blob is as sound as the original: tensor contents; the
position of a recurrent-only blob or of a single cell; a cell at one end of the positions moved to just behind the
other end (``0, 1, 2, 3`` → ``4, 1, 2, 3``), where no second part contradicts it; the token id in an M-RoPE cell; the
sequence id in the header of a blob without cells, or of a recurrent-only one.
Checksums (in files) and the caller's own record of positions cover those.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamastate._native.scan import usual_sequence
from llamastate.errors import CorruptStateError, LayoutMismatchError, NotEnoughCellsError
from llamastate.layout.cursor import Borrowed
from llamastate.layout.infer import identify
from llamastate.layout.positions import POS_END, Rules, check_window, fail, loose_positions, run_positions
from llamastate.layout.schema import MAX_SEQ, KVSchema, Limits, RecurrentSchema, Schema
from llamastate.layout.walk import SEQUENCE_MAGIC, Cells, ContextWalk, SequenceWalk, Span, walk_context, walk_sequence

__all__ = ["ContextInfo", "SequenceInfo", "validate_context", "validate_sequence"]

_HEADER = Struct("<II")  # magic and sequence id

_Parts: TypeAlias = "tuple[KVSchema | RecurrentSchema, ...]"


class SequenceInfo(NamedTuple):
    """What a valid sequence blob holds.

    Parameters
    ----------
    src_seq_id : int or None
        The sequence it was taken from; None if nothing in the blob says.
    n_cells : int
        Cells of the base attention cache in the blob (0 in a ``PARTIAL_ONLY`` blob).
    n_window_cells : int
        Cells of the window cache.
    has_recurrent : bool
        Whether a recurrent state is inside.
    pos_min, pos_max : int
        What ``llama_memory_seq_pos_min`` and ``_max`` report once the blob is restored; -1 if it is empty. With a
        window, ``pos_min`` is the window's first position; with a recurrent state, its only one.
    first_pos : int
        Position of the first cell of the base cache; -1 without one.
    n_bytes : int
        Length of the blob.
    """

    src_seq_id: int | None
    n_cells: int
    n_window_cells: int
    has_recurrent: bool
    pos_min: int
    pos_max: int
    first_pos: int
    n_bytes: int

    @property
    def is_empty(self) -> bool:
        """Whether the blob is of an empty sequence."""
        return self.pos_max < 0


class ContextInfo(NamedTuple):
    """What a valid whole-context blob holds.

    Parameters
    ----------
    arch : str
        The architecture it names.
    sequences : dict
        ``{seq_id: (pos_min, pos_max)}`` as llama.cpp reports them once the blob is restored; empty ones are left out.
    n_cells, n_window_cells, n_recurrent_cells : int
        Cells of each kind of cache, all streams together.
    n_bytes : int
        Length of the blob.
    """

    arch: str
    sequences: dict[int, tuple[int, int]]
    n_cells: int
    n_window_cells: int
    n_recurrent_cells: int
    n_bytes: int


def validate_sequence(
    buf: object,
    schema: Schema,
    limits: Limits,
    *,
    partial: bool = False,
    on_device: bool = False,
    header: bool = True,
    first_pos: int = 0,
) -> SequenceInfo:
    """Check a sequence blob down to the last byte that is no tensor content.

    Parameters
    ----------
    buf : buffer
        The blob, as ``llama_state_seq_get_data_ext`` makes it.
    schema : Schema
        The layout of the context it is meant for.
    limits : Limits
        What that context can hold.
    partial : bool
        The blob was made with ``PARTIAL_ONLY``.
    on_device : bool
        The blob was made with ``ON_DEVICE``: everything but tensor bytes.
    header : bool
        False for the form inside GGSQ files, which lacks the magic and the sequence id.
    first_pos : int
        Only for ``partial``: the first position of the base cache that the window is to go with.

    Returns
    -------
    SequenceInfo

    Raises
    ------
    BadMagicError
        Not a sequence blob.
    LayoutMismatchError
        A sound blob of another model or another kind of cache; ``field`` is ``"kv_unified"``, ``"flash_attn"``,
        ``"n_layer"``, ``"type_k"``, ``"row_k"``, …, ``"memory"`` for another set of caches, or ``"cell_ext"`` if only
        one of both has M-RoPE.
    NotEnoughCellsError
        Sound, but with more cells than the cache has.
    CorruptStateError
        Everything else; ``offset`` and ``section`` say where.

    Notes
    -----
    ``llama_kv_cache::state_read_meta``, ``llama_memory_recurrent::state_read_meta``. Cost: O(cells + layers), tensor
    bytes are neither read nor copied; about 0.1 ms for 2,048 cells in 30 layers.
    """
    with Borrowed(buf) as view:
        usual = None if partial or on_device else _usual(view, schema, limits, header)
        if usual is not None:
            return usual
        try:
            return _check_sequence(
                walk_sequence(view, schema, partial=partial, on_device=on_device, header=header),
                schema,
                limits,
                partial,
                first_pos,
            )
        except CorruptStateError as error:
            _raise_if_foreign(view, schema, partial, header, error)
            raise


def _usual(view: memoryview, schema: Schema, limits: Limits, header: bool) -> SequenceInfo | None:
    """What nearly all blobs are, without a look at anything in Python: see ``_native.scan``. None: look closer."""
    part = schema.parts[0]
    start = _HEADER.size if header else 0
    if (
        len(schema.parts) > 1
        or not isinstance(part, KVSchema)
        or part.has_ext
        or part.n_stream > 1
        or len(view) < start
    ):
        return None
    found = usual_sequence(view[start:], part.preamble, *part.scan_table)
    if found is None:
        return None
    n_cells, first, seq_id = found
    if n_cells > limits.base_cells or seq_id >= MAX_SEQ or first + n_cells > POS_END:
        return None
    if header and _HEADER.unpack_from(view) != (SEQUENCE_MAGIC, seq_id):
        return None
    last = first + n_cells - 1
    return SequenceInfo(seq_id, n_cells, 0, False, first, last, first, len(view))


def _raise_if_foreign(view: memoryview, schema: Schema, partial: bool, header: bool, error: CorruptStateError) -> None:
    """A blob that reads as nonsense may simply be of a model with other caches; then say that instead."""
    parts = identify(view, header=header)
    own = schema.parts_of(partial)
    if parts is None or _may_be_cut_off(parts, own):
        return
    expected: Any
    found: Any
    field, expected, found = "memory", "+".join(p.name for p in own), "+".join(p.name for p in parts)
    if expected == found:
        field, expected, found = "cell_ext", _has_ext(own), _has_ext(parts)
    raise LayoutMismatchError(
        f"the state is of another kind of memory: {field} is {found}, this context has {expected}",
        field=field,
        expected=expected,
        found=found,
        offset=error.offset,
    ) from error


def _may_be_cut_off(parts: _Parts, own: _Parts) -> bool:
    """Whether a blob with ``parts`` can be one of ours that lost its end: it may lack parts, and V of the last one."""
    if len(parts) > len(own):
        return False
    for a, b in zip(parts, own, strict=False):
        if isinstance(a, KVSchema) != isinstance(b, KVSchema):
            return False
        if isinstance(a, KVSchema) and isinstance(b, KVSchema) and (a.has_ext, a.k) != (b.has_ext, b.k):
            return False
    return True


def _has_ext(parts: _Parts) -> bool:
    return any(p.has_ext for p in parts if isinstance(p, KVSchema))


def _check_sequence(walk: SequenceWalk, schema: Schema, limits: Limits, partial: bool, first_pos: int) -> SequenceInfo:
    seq_id = walk.seq_id
    base: NDArray[np.int32] | None = None
    window: NDArray[np.int32] | None = None
    recurrent = -1
    n_base = n_window = 0
    filled: list[bool] = []
    rules = Rules.of(schema)
    for part, span in zip(schema.parts_of(partial), walk.spans, strict=True):
        cells = span.cells if span is not None else None
        filled.append(cells is not None and len(cells.pos) > 0)
        if span is None or cells is None or not filled[-1]:
            continue
        if not isinstance(part, KVSchema):
            recurrent = _one_pos(cells)
            continue
        seq_id = _one_owner(span, seq_id, part)
        pos = run_positions(cells.pos, cells.ext, cells.at, limits.n_vocab, rules, f"{part.name}.cells")
        if part.role == "base":
            base, n_base = pos, len(pos)
        else:
            window, n_window = pos, len(pos)
        _fits(span, limits)
    if seq_id is not None and schema.n_stream > 1 and seq_id >= schema.n_stream:
        fail("header.seq_id", f"sequence {seq_id} of a context with {schema.n_stream} streams", 4)
    start = {part.name: at for part, at in zip(schema.parts_of(partial), walk.starts, strict=True)}
    if any(filled) and not all(filled):
        empty = next(p.name for p, f in zip(schema.parts_of(partial), filled, strict=True) if not f)
        fail(f"{empty}.n_cells", "no cells, although other parts of the sequence have some", start[empty])
    if window is not None:
        check_window(schema, base, window, first_pos, start["window"])
    attention_max = int(base[-1]) if base is not None else int(window[-1]) if window is not None else -1
    if recurrent >= 0 and attention_max >= 0 and recurrent != attention_max:
        fail(
            "recurrent.cells",
            f"the recurrent state is at position {recurrent}, the attention cache at {attention_max}",
            start["recurrent"],
        )
    mins = [int(p[0]) for p in (window if window is not None else base,) if p is not None]
    if recurrent >= 0:
        mins.append(recurrent)
    return SequenceInfo(
        src_seq_id=seq_id,
        n_cells=n_base,
        n_window_cells=n_window,
        has_recurrent=recurrent >= 0,
        pos_min=max(mins, default=-1),
        pos_max=max(attention_max, recurrent),
        first_pos=int(base[0]) if base is not None else -1,
        n_bytes=walk.end,
    )


def _one_pos(cells: Cells) -> int:
    """The position of a sequence's recurrent cell."""
    pos = int(cells.pos[0])
    if not 0 <= pos < POS_END:
        fail("recurrent.cells", f"position {pos}", cells.at)
    return pos


def _one_owner(span: Span, seq_id: int | None, part: KVSchema) -> int:
    """All cells belong to one sequence, the header's if there is one, and lie in that sequence's stream."""
    ids = span.cells.ids
    section = f"{part.name}.cells"
    want = int(ids[0]) if seq_id is None else seq_id
    wrong = ids != want
    if wrong.any():
        i = int(wrong.argmax())
        fail(section, f"cell {i} is of sequence {int(ids[i])}, not {want}", span.cells.where(i))
    if not 0 <= want < MAX_SEQ:
        fail(section, f"sequence id {want} is not in [0, {MAX_SEQ})", span.cells.at)
    if part.n_stream > 1 and want != span.stream:
        fail(f"{part.name}.n_cells", f"sequence {want} lies in stream {span.stream}, not its own", span.cells.at - 4)
    return want


def _fits(span: Span, limits: Limits) -> None:
    """The cache has as many cells as the stream brings."""
    name = span.part.name
    available = limits.base_cells if name == "base" else limits.window_cells
    if name == "recurrent":
        available = max(1, limits.n_seq_max)
    if span.n_cells > available:
        raise NotEnoughCellsError(
            f"the state has {span.n_cells} cells in its {name} part, the context has {available}",
            needed=span.n_cells,
            available=available,
            reason=f"{name} cells",
        )


def validate_context(buf: object, schema: Schema, limits: Limits) -> ContextInfo:
    """Check a whole-context blob down to the last byte that is no tensor content.

    Parameters
    ----------
    buf : buffer
        The blob, as ``llama_state_get_data`` makes it (or a GGSN file from ``state_offset`` on).
    schema : Schema
        The layout of the context it is meant for.
    limits : Limits
        What that context can hold.

    Returns
    -------
    ContextInfo

    Raises
    ------
    LayoutMismatchError
        A sound blob of another model (``field="arch"`` first of all) or another kind of cache.
    NotEnoughCellsError
        Sound, but with more cells than the cache has.
    CorruptStateError
        Everything else; ``offset`` and ``section`` say where.

    Notes
    -----
    ``llama_context::state_read_data``. Cost: O(n log n) in cells; cells shared unevenly between sequences cost about
    0.2 µs each on top.
    """
    with Borrowed(buf) as view:
        return _check_context(walk_context(view, schema), schema, limits)


def _check_context(walk: ContextWalk, schema: Schema, limits: Limits) -> ContextInfo:
    rules = Rules.of(schema)
    base: dict[int, NDArray[np.int32]] | None = None
    window: dict[int, NDArray[np.int32]] | None = None
    recurrent: dict[int, int] | None = None
    totals = {"base": 0, "window": 0, "recurrent": 0}
    for part, spans in zip(schema.parts, walk.parts, strict=True):
        positions: dict[int, NDArray[np.int32]] = {}
        for span in spans:
            totals[part.name] += span.n_cells
            for seq_id, rows in _rows_by_sequence(span, limits):
                pos, ext = span.cells.pos[rows], span.cells.ext[rows] if span.cells.ext is not None else None
                if part.name == "base":
                    section = f"base.cells of sequence {seq_id}"
                    positions[seq_id] = run_positions(pos, ext, span.cells.at, limits.n_vocab, rules, section)
                else:
                    positions[seq_id] = loose_positions(
                        pos, ext, span.cells.at, limits.n_vocab, rules, part.name, seq_id
                    )
            _fits(span, limits)
        if part.name == "base":
            base = positions
        elif part.name == "window":
            window = positions
        else:
            recurrent = {s: int(p[0]) for s, p in positions.items()}
    sequences = _agree(schema, walk, base, window, recurrent)
    return ContextInfo(walk.arch, sequences, totals["base"], totals["window"], totals["recurrent"], walk.end)


def _rows_by_sequence(span: Span, limits: Limits) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each sequence of a span with the rows of its cells, after checking every cell's list of sequences."""
    cells = span.cells
    if not len(cells.pos):
        return
    section = f"{span.part.name}.cells"
    counts = cells.counts
    if int(counts.min()) < 1:
        i = int((counts < 1).argmax())
        fail(section, f"cell {i} belongs to no sequence", cells.where(i))
    owners = cells.owners()
    ids = cells.ids
    bad = (ids < 0) | (ids >= limits.n_seq_max)
    if bad.any():
        j = int(bad.argmax())
        i = int(owners[j])
        fail(section, f"cell {i} is of sequence {int(ids[j])}, not in [0, {limits.n_seq_max})", cells.where(i))
    # The ids of one cell ascend; from one cell to the next anything goes.
    falls = (ids[1:] <= ids[:-1]) & (owners[1:] == owners[:-1])
    if falls.any():
        i = int(owners[int(falls.argmax())])
        fail(section, f"the sequences of cell {i} are not in ascending order", cells.where(i))
    if isinstance(span.part, KVSchema) and span.part.n_stream > 1 and (ids != span.stream).any():
        i = int(owners[int((ids != span.stream).argmax())])
        fail(section, f"cell {i} of stream {span.stream} belongs to another sequence", cells.where(i))
    order = np.argsort(ids, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(ids[order]) != 0])
    for rows in np.split(order, first[1:]):
        yield int(ids[rows[0]]), owners[rows]


def _agree(
    schema: Schema,
    walk: ContextWalk,
    base: dict[int, NDArray[np.int32]] | None,
    window: dict[int, NDArray[np.int32]] | None,
    recurrent: dict[int, int] | None,
) -> dict[int, tuple[int, int]]:
    """The parts tell of the same sequences, up to the same position. Returns their ranges as llama.cpp reports them."""
    start = {part.name: at for part, at in zip(schema.parts, walk.starts, strict=True)}
    known = [set(p) for p in (base, window, recurrent) if p is not None]
    for part, ids in zip(schema.parts, known, strict=True):
        missing = set.union(*known) - ids
        if missing:
            fail(
                f"{part.name}.cells",
                f"sequence {min(missing)} has cells in other parts and none here",
                start[part.name],
            )
    result: dict[int, tuple[int, int]] = {}
    for s in sorted(known[0]):
        low = high = -1
        if base is not None:
            low, high = int(base[s][0]), int(base[s][-1])
            if window is not None:
                check_window(schema, base[s], window[s], 0, start["window"], f"window.cells of sequence {s}")
                low = int(window[s][0])
        if recurrent is not None:
            if high >= 0 and recurrent[s] != high:
                fail(
                    f"recurrent.cells of sequence {s}",
                    f"the recurrent state is at position {recurrent[s]}, the attention cache at {high}",
                    start["recurrent"],
                )
            low = high = recurrent[s]
        result[s] = (low, high)
    return result
