"""Joining pieces of one sequence, such as blocks of 64 tokens, to one state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamastate.errors import CorruptStateError, LayoutMismatchError, UnsupportedLayoutError
from llamastate.layout.positions import check_run, check_window
from llamastate.layout.schema import MAX_SEQ, RecurrentSchema, Schema
from llamastate.layout.structure import KVPart, Part, Rows, SequenceState, copy_all, lay_out

__all__ = ["compose"]


def compose(pieces: Iterable[SequenceState], *, seq_id: int | None = None, out: object | None = None) -> SequenceState:
    """Join pieces of one sequence to a state that can be restored.

    Parameters
    ----------
    pieces : iterable of SequenceState
        States or slices with the same schema that together hold every position of a run exactly once, in any order.
    seq_id : int, optional
        The sequence to name; that of the first piece by default. (The stream, when the cache is not unified.)
    out : buffer, optional
        Where to write the blob; newly allocated by default.

    Returns
    -------
    SequenceState
        Rows ascending by position; :attr:`~SequenceState.blob` is the finished blob, without another copy. Window rows
        that no later token can see are left out, as llama.cpp leaves them out. The recurrent state is the one at the
        last position.

    Raises
    ------
    LayoutMismatchError
        The pieces differ in layout.
    UnsupportedLayoutError
        A piece is partial, or nothing but recurrent.
    CorruptStateError
        Positions are missing or double, the window is incomplete, or no piece has the recurrent state of the end.
    BufferTooSmallError, InvalidBufferError
        ``out`` does not serve.
    ValueError
        No pieces, or a sequence id out of range.

    Notes
    -----
    Cost: every row is copied once; a sort of the positions unless the pieces come in order.
    """
    pieces = list(pieces)
    if not pieces:
        raise ValueError("there is nothing to compose")
    schema = pieces[0].schema
    for i, piece in enumerate(pieces):
        if piece.schema != schema:
            raise LayoutMismatchError(
                f"piece {i} has another layout than piece 0",
                field="schema",
                expected=schema.digest(),
                found=piece.schema.digest(),
            )
        if piece.partial or piece.base is None:
            raise UnsupportedLayoutError(
                f"piece {i} holds no base cache", arch=schema.arch, kind=schema.kind, reason="only attention composes"
            )
    seq_id = pieces[0].seq_id if seq_id is None else seq_id
    if not 0 <= seq_id < (schema.n_stream if schema.n_stream > 1 else MAX_SEQ):
        raise ValueError(f"sequence id {seq_id} is out of range")

    base = [p.base for p in pieces if p.base is not None]
    positions = _run(base, schema)
    last = int(positions[-1]) if len(positions) else -1
    window: list[KVPart] = []
    if "window" in (p.name for p in schema.parts):
        # What llama.cpp writes: the cells that the last token sees.
        window = [p.window.between(schema.window_start(last), last + 1) for p in pieces if p.window is not None]
        if last >= 0:
            check_window(schema, positions, np.sort(np.concatenate([p.pos for p in window])))
    sources: list[Sequence[Part]] = []
    for layout in schema.parts:
        if isinstance(layout, RecurrentSchema):
            sources.append(_recurrent_at(pieces, last))
        else:
            sources.append(base if layout.role == "base" else window)

    result = lay_out(schema, [sum(p.n_cells for p in s) for s in sources], seq_id, pieces[0].header, False, out)
    for to, source in zip(result.parts, sources, strict=True):
        for rows, part in _destinations(source):
            if isinstance(rows, slice):
                place = to.take(rows)
                place.cells[...] = part.cells
                copy_all(place.tensors(), part.tensors())
            else:
                _scatter(to, rows, part)
        if isinstance(to, KVPart):
            to.cells["seq_id"] = seq_id
    return result


def _run(base: Sequence[KVPart], schema: Schema) -> NDArray[np.int32]:
    """The positions of all pieces as one run, checked and sorted."""
    pos = np.concatenate([p.pos for p in base])
    if not len(pos):
        return pos
    ext = None
    if base[0].schema.has_ext:
        columns = [np.concatenate([p.cells[name] for p in base]) for name in ("x", "y", "token")]
        ext = np.stack(columns, axis=1)
    return check_run(schema, pos, ext)


def _recurrent_at(pieces: Sequence[SequenceState], last: int) -> list[Part]:
    """The recurrent state at the last position (none if there is no position)."""
    if last < 0:
        return []
    for piece in reversed(pieces):
        part = piece.recurrent
        if part is not None and part.n_cells and int(part.pos[0]) == last:
            return [part]
    reason = f"no piece holds the recurrent state at position {last}"
    raise CorruptStateError(f"cannot compose: {reason}", reason=reason, section="recurrent.cells")


def _destinations(parts: Sequence[Part]) -> list[tuple[Rows, Part]]:
    """For each part the rows of the result its cells go to, so that the whole ascends by position."""
    parts = [p for p in parts if p.n_cells]
    kv = [p for p in parts if isinstance(p, KVPart)]
    ends = np.cumsum([p.n_cells for p in parts])
    starts = ends - [p.n_cells for p in parts] if parts else ends
    in_order = all(p.order is None for p in kv) and all(
        int(a.sorted_pos[-1]) < int(b.sorted_pos[0]) for a, b in pairwise(kv)
    )
    if in_order:
        return [(slice(int(a), int(b)), p) for a, b, p in zip(starts, ends, parts, strict=True)]
    keys = [np.concatenate([p.pos for p in kv])]
    if kv[0].schema.has_ext:
        keys = [np.concatenate([p.cells[name] for p in kv]) for name in ("x", "y")] + keys
    rank = np.empty(int(ends[-1]), np.intp)
    rank[np.lexsort(keys)] = np.arange(int(ends[-1]))
    result: list[tuple[Rows, Part]] = []
    for a, b, p in zip(starts, ends, parts, strict=True):
        rows = rank[int(a) : int(b)]
        together = bool((np.diff(rows) == 1).all())
        result.append((slice(int(rows[0]), int(rows[0]) + len(rows)) if together else rows, p))
    return result


def _scatter(to: Part, rows: NDArray[np.intp], part: Part) -> None:
    """Copy cells to rows that do not lie together."""
    to.cells[rows] = part.cells
    if isinstance(to, KVPart) and isinstance(part, KVPart):
        for a, b in zip(to.k, part.k, strict=True):
            a[rows] = b
        for a, b in zip(to.v, part.v, strict=True):
            a[(slice(None), rows) if to.schema.v_trans else rows] = b
