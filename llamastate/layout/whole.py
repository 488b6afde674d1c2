"""A whole context's state as arrays, and single sequences out of it.

The cells of a context may be shared by several sequences, so their records differ in size. They are kept as the bytes
they are, with their positions and owners beside them; K, V, R and S are views as in
:mod:`llamastate.layout.structure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamastate.errors import InvalidSequenceError
from llamastate.layout.cursor import Borrowed, Writer, writable_bytes
from llamastate.layout.schema import MAX_SEQ, KVSchema, RecurrentSchema, Schema
from llamastate.layout.structure import Part, SequenceState, empty_part, make_part, tensor_views
from llamastate.layout.walk import Cells, walk_context

__all__ = ["ContextState", "StreamPart", "parse_context"]


@dataclass(frozen=True, eq=False)
class StreamPart:
    """The cells of one stream of one cache, of all sequences in it.

    Parameters
    ----------
    schema : KVSchema or RecurrentSchema
        Its layout.
    stream : int
        Which stream; 0 if unified or recurrent.
    cells : Cells
        Positions, extras and owners.
    records : uint8[m]
        The cells' records as they stand in the blob.
    tensors : tuple of ndarray
        All layers in the order of the blob (K then V, or R then S), as :class:`~llamastate.layout.KVPart` has them.
    """

    schema: KVSchema | RecurrentSchema
    stream: int
    cells: Cells
    records: NDArray[np.uint8]
    tensors: tuple[NDArray[Any], ...]

    @property
    def n_cells(self) -> int:
        """How many cells."""
        return len(self.cells.pos)

    def rows_of(self, seq_id: int) -> NDArray[np.int64]:
        """The cells of one sequence, in the order of the cache: ``int64[n]``."""
        rows: NDArray[np.int64] = self.cells.owners()[self.cells.ids == seq_id]
        return rows


@dataclass(frozen=True, eq=False)
class ContextState:
    """The state of all sequences of a context.

    Parameters
    ----------
    schema : Schema
        The layout it has.
    arch : str
        The architecture it names.
    parts : tuple of tuple of StreamPart
        For each part of the schema the streams that hold cells. The recurrent part always has one.
    """

    schema: Schema
    arch: str
    parts: tuple[tuple[StreamPart, ...], ...]

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """The sequences that have cells, ascending."""
        ids = [s.cells.ids for streams in self.parts for s in streams]
        return tuple(int(i) for i in np.unique(np.concatenate(ids))) if ids else ()

    @property
    def nbytes(self) -> int:
        """Length of the blob."""
        total = 4 + len(self.arch.encode())
        for layout, streams in zip(self.schema.parts, self.parts, strict=True):
            total += 4 + 4 * layout.n_stream if isinstance(layout, KVSchema) else 4
            for s in streams:
                total += len(s.records) + len(layout.preamble)
                total += sum(len(t.header) + s.n_cells * t.cell_bytes for t in layout.tensors)
        return total

    def to_bytes(self) -> bytes:
        """The blob; one parsed gives the bytes it was parsed from."""
        out = np.empty(self.nbytes, np.uint8)
        self.write_into(out)
        return out.tobytes()

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
        nbytes = self.nbytes
        writer = Writer(writable_bytes(out, nbytes))
        arch = self.arch.encode()
        writer.u32(len(arch))
        writer.put(arch)
        for layout, streams in zip(self.schema.parts, self.parts, strict=True):
            if isinstance(layout, RecurrentSchema):
                _write_stream(writer, streams[0])
                continue
            writer.u32(layout.n_stream)
            filled = {s.stream: s for s in streams}
            for stream in range(layout.n_stream):
                if stream in filled:
                    _write_stream(writer, filled[stream])
                else:
                    writer.u32(0)
        return nbytes

    def extract(self, seq_id: int) -> SequenceState:
        """One sequence of the context, as ``llama_state_seq_get_data`` would have given it.

        Parameters
        ----------
        seq_id : int
            Any id in ``[0, 256)``; one without cells gives an empty state.

        Returns
        -------
        SequenceState
            Equal byte for byte to the sequence blob of the same moment. Views where the sequence's cells lie together.

        Raises
        ------
        InvalidSequenceError
            The id is out of range.
        """
        limit = self.schema.n_stream if self.schema.n_stream > 1 else MAX_SEQ
        if not 0 <= seq_id < limit:
            raise InvalidSequenceError(f"sequence {seq_id} is not in [0, {limit})", seq_id=seq_id, n_seq_max=limit)
        parts = tuple(
            self._extract_part(seq_id, layout, streams)
            for layout, streams in zip(self.schema.parts, self.parts, strict=True)
        )
        return SequenceState(self.schema, seq_id, parts)

    def _extract_part(self, seq_id: int, layout: KVSchema | RecurrentSchema, streams: tuple[StreamPart, ...]) -> Part:
        for s in streams:
            rows = s.rows_of(seq_id)
            if len(rows) and layout.name == "window":
                pos = s.cells.pos[rows]
                rows = rows[pos >= self.schema.window_start(int(pos.max()))]
            if not len(rows):
                continue
            cells = np.zeros(len(rows), layout.record_dtype)
            cells["pos"] = s.cells.pos[rows]
            if isinstance(layout, KVSchema):
                cells["n_seq_id"] = 1
                cells["seq_id"] = seq_id
                if s.cells.ext is not None:
                    for i, name in enumerate(("x", "y", "token")):
                        cells[name] = s.cells.ext[rows, i]
            first = int(rows[0])
            together = bool((np.diff(rows) == 1).all())
            index: slice | NDArray[np.int64] = slice(first, first + len(rows)) if together else rows
            tensors = tuple(
                a[:, index] if t.columns else a[index] for t, a in zip(layout.tensors, s.tensors, strict=True)
            )
            return make_part(layout, cells, tensors)
        return empty_part(layout)


def parse_context(buf: object, schema: Schema) -> ContextState:
    """Take a whole-context blob apart without copying.

    Parameters
    ----------
    buf : buffer
        The blob. It must not change while the result or any array of it is in use.
    schema : Schema
        The layout of the context it came from.

    Returns
    -------
    ContextState
        Its :meth:`~ContextState.to_bytes` gives the same bytes.

    Raises
    ------
    LoadError
        As :func:`~llamastate.layout.walk.walk_context`; positions and sequence ids are not looked at.
    """
    with Borrowed(buf) as view:
        return _parse(view, schema)


def _parse(view: memoryview, schema: Schema) -> ContextState:
    walk = walk_context(view, schema)
    data = np.frombuffer(view, np.uint8)
    parts = tuple(
        tuple(
            StreamPart(
                span.part,
                span.stream,
                span.cells,
                data[span.cells.at : span.cells.end],
                tensor_views(data, span.part, span.data, span.n_cells),
            )
            for span in spans
        )
        for spans in walk.parts
    )
    return ContextState(schema, walk.arch, parts)


def _write_stream(writer: Writer, s: StreamPart) -> None:
    writer.u32(s.n_cells)
    writer.room(len(s.records))[...] = s.records
    writer.put(s.schema.preamble)
    data = writer.at
    for tensor in s.schema.tensors:
        writer.put(tensor.header)
        writer.room(s.n_cells * tensor.cell_bytes)
    for a, b in zip(tensor_views(writer.out, s.schema, data, s.n_cells), s.tensors, strict=True):
        a[...] = b
