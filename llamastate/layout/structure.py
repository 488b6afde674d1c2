"""One sequence's state as arrays: views of a blob, cut by positions, converted, written again.

A :class:`SequenceState` copies nothing: its K, V, R and S are views of the buffer it was parsed from (which they keep
alive). :meth:`SequenceState.slice` gives views again wherever the rows lie together. Whatever needs new bytes
(:func:`~llamastate.layout.compose`, the conversions) lays out one new blob and copies each row into its final place,
once.

Parsing checks the structure and nothing else; run :func:`~llamastate.layout.validate_sequence` on bytes from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamastate.errors import CorruptStateError, UnsupportedLayoutError
from llamastate.layout.cursor import Borrowed, Writer, writable_bytes
from llamastate.layout.schema import KVSchema, RecurrentSchema, Schema
from llamastate.layout.walk import SEQUENCE_MAGIC, walk_sequence

__all__ = [
    "KVPart",
    "Part",
    "RecurrentPart",
    "Rows",
    "SequenceState",
    "copy_all",
    "empty_part",
    "lay_out",
    "make_part",
    "parse_sequence",
    "tensor_views",
]

Rows: TypeAlias = "slice | NDArray[np.intp]"


@dataclass(frozen=True, eq=False)
class KVPart:
    """One attention cache of a sequence.

    Parameters
    ----------
    schema : KVSchema
        Its layout.
    cells : structured[n]
        ``pos``, ``n_seq_id``, ``x``, ``y``, ``token`` (those three with cell extras only), ``seq_id``.
    k : tuple of uint8[n, row_bytes]
        One array a layer.
    v : tuple of uint8[n, row_bytes] or uint16[n_embd_v, n]
        One array a layer. Transposed values have an unsigned dtype of the element's width.
    """

    schema: KVSchema
    cells: NDArray[Any]
    k: tuple[NDArray[Any], ...]
    v: tuple[NDArray[Any], ...]

    @property
    def n_cells(self) -> int:
        """How many cells."""
        return len(self.cells)

    @property
    def pos(self) -> NDArray[np.int32]:
        """Position of each cell: ``int32[n]``."""
        return self.cells["pos"]

    @cached_property
    def order(self) -> NDArray[np.intp] | None:
        """The rows sorted by position (by y, then x within one); None if they already are. Computed once."""
        keys = self.pos.astype(np.int64)
        if self.schema.has_ext:
            x, y = self.cells["x"].astype(np.int64), self.cells["y"].astype(np.int64)
            falls = (np.diff(keys) < 0) | (
                (np.diff(keys) == 0) & ((np.diff(y) < 0) | ((np.diff(y) == 0) & (np.diff(x) < 0)))
            )
            return np.lexsort((x, y, keys)) if falls.any() else None
        return np.argsort(keys, kind="stable") if (np.diff(keys) < 0).any() else None

    @cached_property
    def sorted_pos(self) -> NDArray[np.int64]:
        """The positions, ascending: ``int64[n]``. Computed once."""
        # As wide as the Python integers they are searched for, or each search would convert them all.
        return (self.pos if self.order is None else self.pos[self.order]).astype(np.int64)

    def take(self, rows: Rows) -> KVPart:
        """Some of the cells. Views if ``rows`` is a slice, copies if it is an index array."""
        v = tuple(a[:, rows] if self.schema.v_trans else a[rows] for a in self.v)
        return KVPart(self.schema, self.cells[rows], tuple(a[rows] for a in self.k), v)

    def between(self, p0: int, p1: int) -> KVPart:
        """The cells with positions in ``[p0, p1)``, ascending. Views if they lie together in the cache."""
        a, b = (int(i) for i in np.searchsorted(self.sorted_pos, (p0, p1)))
        if self.order is None:
            return self.take(slice(a, b))
        rows = self.order[a:b]
        if len(rows) and bool((np.diff(rows) == 1).all()):
            return self.take(slice(int(rows[0]), int(rows[0]) + len(rows)))
        return self.take(rows)

    def tensors(self) -> tuple[NDArray[Any], ...]:
        """All layers in the order of the blob."""
        return (*self.k, *self.v)


@dataclass(frozen=True, eq=False)
class RecurrentPart:
    """The recurrent state of a sequence.

    Parameters
    ----------
    schema : RecurrentSchema
        Its layout.
    cells : structured[n]
        ``pos`` and ``n_seq_id``; n is 0 or 1.
    r, s : tuple of uint8[n, row_bytes]
        One array a recurrent layer.
    """

    schema: RecurrentSchema
    cells: NDArray[Any]
    r: tuple[NDArray[Any], ...]
    s: tuple[NDArray[Any], ...]

    @property
    def n_cells(self) -> int:
        """1, or 0 without a state."""
        return len(self.cells)

    @property
    def pos(self) -> NDArray[np.int32]:
        """Position of the cell: ``int32[n]``."""
        return self.cells["pos"]

    def take(self, rows: Rows) -> RecurrentPart:
        """The state (``slice(None)``), or the same part without one (``slice(0)``)."""
        return RecurrentPart(
            self.schema, self.cells[rows], tuple(a[rows] for a in self.r), tuple(a[rows] for a in self.s)
        )

    def tensors(self) -> tuple[NDArray[Any], ...]:
        """All layers in the order of the blob."""
        return (*self.r, *self.s)


Part: TypeAlias = "KVPart | RecurrentPart"


@dataclass(frozen=True, eq=False)
class SequenceState:
    """The state of one sequence.

    Parameters
    ----------
    schema : Schema
        The layout it has.
    seq_id : int
        The sequence it names (0 where the blob names none). Restoring ignores it; it also is the stream that holds the
        cells when the cache is not unified.
    parts : tuple of KVPart and RecurrentPart
        In the order of the blob.
    header : bool
        Whether the blob begins with magic and sequence id (in memory) or not (in files).
    partial : bool
        Whether this is a ``PARTIAL_ONLY`` state.
    """

    schema: Schema
    seq_id: int
    parts: tuple[Part, ...]
    header: bool = True
    partial: bool = False
    _blob: NDArray[np.uint8] | None = field(default=None, repr=False)

    def _kv(self, role: str) -> KVPart | None:
        return next((p for p in self.parts if isinstance(p, KVPart) and p.schema.role == role), None)

    @property
    def base(self) -> KVPart | None:
        """The full attention cache, if this state has one."""
        return self._kv("base")

    @property
    def window(self) -> KVPart | None:
        """The sliding-window cache, if this state has one."""
        return self._kv("window")

    @property
    def recurrent(self) -> RecurrentPart | None:
        """The recurrent part, if this state has one."""
        return next((p for p in self.parts if isinstance(p, RecurrentPart)), None)

    @property
    def n_cells(self) -> int:
        """Cells of the base cache."""
        return self.base.n_cells if self.base is not None else 0

    @property
    def nbytes(self) -> int:
        """Length of the blob."""
        return _nbytes(self.schema, [p.n_cells for p in self.parts], self.header, self.partial)

    @property
    def blob(self) -> NDArray[np.uint8]:
        """The blob as ``uint8[nbytes]``: the buffer this state is a view of, if there is one, else newly written."""
        if self._blob is not None:
            return self._blob
        out = np.empty(self.nbytes, np.uint8)
        self.write_into(out)
        return out

    def to_bytes(self) -> bytes:
        """The blob as bytes. One parsed and not changed gives the bytes it was parsed from."""
        return self.blob.tobytes()

    def write_into(self, out: object) -> int:
        """Write the blob to the front of a writable buffer.

        Returns
        -------
        int
            The bytes written, :attr:`nbytes`.

        Raises
        ------
        BufferTooSmallError, InvalidBufferError
            Nothing was written.
        """
        counts = [p.n_cells for p in self.parts]
        target = lay_out(self.schema, counts, self.seq_id, self.header, self.partial, out)
        for to, source in zip(target.parts, self.parts, strict=True):
            to.cells[...] = source.cells
            for a, b in zip(to.tensors(), source.tensors(), strict=True):
                a[...] = b
        return target.nbytes

    def slice(self, p0: int = 0, p1: int = -1) -> SequenceState:
        """The rows of the tokens at positions ``[p0, p1)``: a piece, for :func:`~llamastate.layout.compose`.

        Parameters
        ----------
        p0, p1 : int
            Token positions; -1 for ``p1`` means to the end.

        Returns
        -------
        SequenceState
            Base rows and window rows in that range, ascending by position; views where they lie together. Of the window
            only those rows are there that the sequence still had: a piece can end a composition only if it was taken
            while its end was inside the window. A recurrent state cannot be cut: the piece that includes its position
            has it, the others have none.

        Raises
        ------
        UnsupportedLayoutError
            The state is nothing but recurrent, or partial.

        Notes
        -----
        Cost: O(log n) for rows in order, after one sort; rows out of order are copied.
        """
        if self.partial or self.base is None:
            what = "a partial state" if self.partial else "a recurrent state"
            raise UnsupportedLayoutError(
                f"{what} cannot be cut by tokens",
                arch=self.schema.arch,
                kind=self.schema.kind,
                reason=f"{what} is whole",
            )
        if p1 < 0:
            p1 = 2**31
        parts: list[Part] = []
        for part in self.parts:
            if isinstance(part, KVPart):
                parts.append(part.between(p0, p1))
            else:
                inside = part.n_cells > 0 and p0 <= int(part.pos[0]) < p1
                parts.append(part if inside else part.take(slice(0)))
        return replace(self, parts=tuple(parts), _blob=None)

    def with_v_trans(self, v_trans: bool) -> SequenceState:
        """The same state for a context with flash attention off (True) or on (False).

        Raises
        ------
        UnsupportedLayoutError
            V has a block type, which cannot be transposed.

        Notes
        -----
        Cost: one copy of the state.
        """
        if self.schema.v_trans == v_trans:
            return self
        schema = self.schema.with_v_trans(v_trans)
        result = lay_out(schema, [p.n_cells for p in self.parts], self.seq_id, self.header, self.partial)
        for to, source in zip(result.parts, self.parts, strict=True):
            to.cells[...] = source.cells
            if not isinstance(to, KVPart) or not isinstance(source, KVPart):
                copy_all(to.tensors(), source.tensors())
                continue
            copy_all(to.k, source.k)
            for a, b in zip(to.v, source.v, strict=True):
                # The transposed side has elements [n_embd_v, n], the other rows of bytes.
                if v_trans:
                    a[...] = b.view(a.dtype).T
                else:
                    a.view(b.dtype)[...] = b.T
        return result

    def with_unified(self, n_stream: int = 1, stream: int = 0) -> SequenceState:
        """The same state for a context with another number of streams. No tensor is copied.

        Parameters
        ----------
        n_stream : int
            1 for a unified cache, else the ``n_seq_max`` of the context.
        stream : int
            The stream to put the cells into, when there are several; becomes the sequence id as well.

        Raises
        ------
        ValueError
            ``n_stream`` or ``stream`` out of range.
        """
        schema = self.schema.with_n_stream(n_stream)
        if n_stream > 1 and not 0 <= stream < n_stream:
            raise ValueError(f"stream must be in [0, {n_stream}), not {stream}")
        seq_id = stream if n_stream > 1 else self.seq_id
        parts: list[Part] = []
        for part, layout in zip(self.parts, schema.parts_of(self.partial), strict=True):
            if isinstance(part, KVPart) and isinstance(layout, KVSchema):
                cells = part.cells.copy()
                cells["seq_id"] = seq_id
                parts.append(replace(part, schema=layout, cells=cells))
            else:
                parts.append(part)
        return replace(self, schema=schema, seq_id=seq_id, parts=tuple(parts), _blob=None)

    def with_header(self, header: bool) -> SequenceState:
        """The same state in the form for memory (True) or for GGSQ files (False). Nothing is copied."""
        if header == self.header:
            return self
        blob = self._blob[8:] if self._blob is not None and not header else None
        return replace(self, header=header, _blob=blob)


def parse_sequence(buf: object, schema: Schema, *, partial: bool = False, header: bool = True) -> SequenceState:
    """Take a sequence blob apart without copying.

    Parameters
    ----------
    buf : buffer
        The blob. It must not change while the result or any array of it is in use.
    schema : Schema
        The layout of the context it came from.
    partial : bool
        It was made with ``PARTIAL_ONLY``.
    header : bool
        False for the form inside GGSQ files.

    Returns
    -------
    SequenceState
        Its :meth:`~SequenceState.to_bytes` gives the same bytes.

    Raises
    ------
    LoadError
        As :func:`~llamastate.layout.walk.walk_sequence`; positions are not looked at.
    """
    with Borrowed(buf) as view:
        return _parse(view, schema, partial, header)


def _parse(view: memoryview, schema: Schema, partial: bool, header: bool) -> SequenceState:
    walk = walk_sequence(view, schema, partial=partial, header=header)
    data = np.frombuffer(view, np.uint8)
    seq_id = walk.seq_id
    parts: list[Part] = []
    for layout, span in zip(schema.parts_of(partial), walk.spans, strict=True):
        if span is None or not span.n_cells:
            parts.append(empty_part(layout))
            continue
        cells = data[span.cells.at : span.cells.end].view(layout.record_dtype)
        if isinstance(layout, KVSchema):
            if seq_id is None:
                seq_id = span.stream if layout.n_stream > 1 else int(span.cells.ids[0])
            if layout.n_stream > 1 and span.stream != seq_id:
                reason = f"sequence {seq_id} lies in stream {span.stream}, not its own"
                raise CorruptStateError(
                    reason, reason=reason, offset=span.cells.at - 4, section=f"{layout.name}.n_cells"
                )
        parts.append(make_part(layout, cells, tensor_views(data, layout, span.data, span.n_cells)))
    return SequenceState(schema, seq_id or 0, tuple(parts), header, partial, data)


def copy_all(to: Sequence[NDArray[Any]], source: Sequence[NDArray[Any]]) -> None:
    """Copy the elements of each array into the array of the same place."""
    for a, b in zip(to, source, strict=True):
        a[...] = b


def _nbytes(schema: Schema, counts: Sequence[int], header: bool, partial: bool) -> int:
    parts = schema.parts_of(partial)
    return 8 * header + sum(p.sequence_bytes(n) for p, n in zip(parts, counts, strict=True))


def lay_out(
    schema: Schema, counts: Sequence[int], seq_id: int, header: bool, partial: bool, out: object | None = None
) -> SequenceState:
    """A blob with every header written and every cell and row still to be filled, as a state of writable views."""
    nbytes = _nbytes(schema, counts, header, partial)
    data = np.empty(nbytes, np.uint8) if out is None else writable_bytes(out, nbytes)
    writer = Writer(data)
    if header:
        writer.u32(SEQUENCE_MAGIC)
        writer.u32(seq_id)
    parts: list[Part] = []
    for layout, n_cells in zip(schema.parts_of(partial), counts, strict=True):
        if isinstance(layout, KVSchema):
            own = seq_id if layout.n_stream > 1 else 0
            writer.u32(layout.n_stream)
            part = empty_part(layout)
            for stream in range(layout.n_stream):
                if stream == own and n_cells:
                    part = _stamp(writer, layout, n_cells)
                else:
                    writer.u32(0)
        else:
            part = _stamp(writer, layout, n_cells)
        parts.append(part)
    assert writer.at == nbytes
    return SequenceState(schema, seq_id, tuple(parts), header, partial, data)


def _stamp(writer: Writer, layout: KVSchema | RecurrentSchema, n_cells: int) -> Part:
    writer.u32(n_cells)
    cells = writer.room(n_cells * layout.record_bytes).view(layout.record_dtype)
    writer.put(layout.preamble)
    data = writer.at
    for tensor in layout.tensors:
        writer.put(tensor.header)
        writer.room(n_cells * tensor.cell_bytes)
    return make_part(layout, cells, tensor_views(writer.out, layout, data, n_cells))


def make_part(layout: KVSchema | RecurrentSchema, cells: NDArray[Any], tensors: tuple[NDArray[Any], ...]) -> Part:
    """A part out of its cells and its layers in the order of the blob."""
    if isinstance(layout, KVSchema):
        return KVPart(layout, cells, tensors[: len(layout.k)], tensors[len(layout.k) :])
    return RecurrentPart(layout, cells, tensors[: len(layout.r)], tensors[len(layout.r) :])


def empty_part(layout: KVSchema | RecurrentSchema) -> Part:
    """A part without cells."""
    tensors = (
        np.empty((t.columns, 0), t.element) if t.columns else np.empty((0, t.cell_bytes), np.uint8)
        for t in layout.tensors
    )
    return make_part(layout, np.empty(0, layout.record_dtype), tuple(tensors))


def tensor_views(
    data: NDArray[np.uint8], layout: KVSchema | RecurrentSchema, at: int, n_cells: int
) -> tuple[NDArray[Any], ...]:
    """Views of the layers whose headers begin at byte ``at``, in the order of the blob.

    Returns
    -------
    tuple of ndarray
        ``uint8[n_cells, row_bytes]``; transposed values ``[n_embd_v, n_cells]`` with one unsigned integer an element.
    """
    views = []
    for tensor in layout.tensors:
        begin = at + len(tensor.header)
        at = begin + n_cells * tensor.cell_bytes
        flat = data[begin:at]
        if tensor.columns:
            views.append(flat.view(tensor.element).reshape(tensor.columns, n_cells))
        else:
            views.append(flat.reshape(n_cells, tensor.cell_bytes))
    return tuple(views)
