"""Rows between a sequence and blocks.

A block's rows are a sequence blob of their own, as a unified cache of the same model would give it, with every part
but the attention rows empty. In a unified cache with a sequence to spare such a piece moves by itself: llama.cpp writes
or reads just these rows, by way of the spare sequence, which shares the cells for a moment. Nothing else is copied, so
the cost follows what is moved. Where there is no such sequence the whole state is taken apart, or put together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llamastate import layout
from llamastate._native import log, memory, state
from llamastate.errors import CorruptStateError, LoadError, NotEnoughCellsError, TokensMismatchError
from llamastate.flags import SeqFlags
from llamastate.layout import KVSchema, Schema, SequenceState
from llamastate.layout.positions import check_run
from llamastate.layout.structure import KVPart, copy_all, empty_part, lay_out
from llamastate.prefix.entry import Entry

if TYPE_CHECKING:
    from llamastate.context import Context

__all__ = ["Place", "Placer", "RowReader", "take_partial"]

_SEQ_AND_COUNTS = 16  # magic, sequence id, number of streams, number of cells


class Place(NamedTuple):
    """How a context's pieces look, whatever its number of streams."""

    schema: Schema
    base: Schema | None
    trailer: bytes

    @property
    def has_rows(self) -> bool:
        """Whether there are rows that can be cut by tokens."""
        return self.base is not None

    def rows_bytes(self, n_tokens: int) -> int:
        """Bytes of the rows of ``n_tokens`` tokens as a blob."""
        if self.base is None or not n_tokens:
            return 0
        return 8 + self.base.parts[0].sequence_bytes(n_tokens) + len(self.trailer)


@functools.lru_cache(maxsize=64)
def place_of(schema: Schema) -> Place:
    """What pieces for contexts of this layout look like."""
    one = schema.with_n_stream(1)
    part = one.parts[0]
    if not isinstance(part, KVSchema):
        return Place(one, None, b"")
    base = dataclasses.replace(one, parts=(part,), n_swa=0, swa_type="none")
    empty = lay_out(one, [0] * len(one.parts), 0, True, False).to_bytes()
    return Place(one, base, empty[8 + part.sequence_bytes(0) :])


def spare_sequence(ctx: Context, *taken: int) -> int | None:
    """An empty sequence that a piece can pass through, if this context has one."""
    if not ctx._params.get("kv_unified") or ctx.n_seq_max < 2:
        return None
    # from the end: programs tend to use the first ones
    for seq in range(ctx.n_seq_max - 1, -1, -1):
        if seq not in taken and ctx.seq_pos_max(seq) < 0 and ctx.seq_pos_min(seq) < 0:
            return seq
    return None


class RowReader:
    """Takes rows out of one sequence, under the context's lock.

    Parameters
    ----------
    ctx : Context
        Locked by the caller.
    seq_id : int
    """

    def __init__(self, ctx: Context, seq_id: int) -> None:
        self.ctx = ctx
        self.seq_id = seq_id
        self.place = place_of(ctx.schema)
        self._spare = spare_sequence(ctx, seq_id)
        self._whole: SequenceState | None = None
        self._buffer = np.empty(0, np.uint8)

    def read(self, p0: int, p1: int, out: npt.NDArray[np.uint8]) -> None:
        """Write the rows of tokens ``[p0, p1)`` into ``out``, of :meth:`Place.rows_bytes` bytes.

        Raises
        ------
        TokensMismatchError
            The sequence does not hold each of these positions once.
        """
        if self._spare is None or not self._through_spare(self._spare, p0, p1, out):
            self._from_whole(p0, p1, out)

    def _through_spare(self, spare: int, p0: int, p1: int, out: npt.NDArray[np.uint8]) -> bool:
        handle = self.ctx._handle
        shared = handle.shared
        memory.seq_cp(handle, self.seq_id, spare, p0, p1)
        try:
            n = state.seq_get_size(handle, spare, 0)
            # the window's rows and the recurrent state follow the rows that are wanted
            target = out if n == out.nbytes else self._room(n)
            state.seq_get_data_into(handle, target, spare, 0)
        finally:
            memory.seq_rm(handle, spare, -1, -1)
            handle.shared = shared
        return self._copy_in_order(target[:n], p0, p1, out)

    def _room(self, n: int) -> npt.NDArray[np.uint8]:
        if self._buffer.nbytes < n:
            self._buffer = np.empty(n, np.uint8)
        return self._buffer

    def _copy_in_order(self, blob: npt.NDArray[np.uint8], p0: int, p1: int, out: npt.NDArray[np.uint8]) -> bool:
        """Make the piece out of a blob whose cells are the ones in order; False if they are not."""
        base, trailer = self.place.base, self.place.trailer
        assert base is not None
        part = base.parts[0]
        assert isinstance(part, KVSchema)
        n, length = p1 - p0, out.nbytes - len(trailer)
        if int(blob[12:16].view("<u4")[0]) != n or blob.nbytes < length:
            return False
        cells = blob[_SEQ_AND_COUNTS : _SEQ_AND_COUNTS + n * part.record_bytes].view(part.record_dtype)
        if not np.array_equal(cells["pos"], np.arange(p0, p1, dtype=np.int32)):
            return False
        if part.has_ext:
            _check_text(base, cells)
        if blob.base is not out and blob.ctypes.data != out.ctypes.data:
            out[:length] = blob[:length]
        out[length:] = np.frombuffer(trailer, np.uint8)
        # the same bytes whichever sequence they came through
        out[4:8] = 0
        out[_SEQ_AND_COUNTS : _SEQ_AND_COUNTS + n * part.record_bytes].view(part.record_dtype)["seq_id"] = 0
        return True

    def _from_whole(self, p0: int, p1: int, out: npt.NDArray[np.uint8]) -> None:
        if self._whole is None:
            self._whole = layout.parse_sequence(self.ctx.state_seq_get_data(self.seq_id), self.ctx.schema)
        source = self._whole.base
        assert source is not None
        rows = source.between(p0, p1)
        if not np.array_equal(rows.pos, np.arange(p0, p1, dtype=np.int32)):
            raise TokensMismatchError(
                f"sequence {self.seq_id} does not hold each of the positions {p0} to {p1 - 1} once",
                n_tokens=p1,
                pos_min=self.ctx.seq_pos_min(self.seq_id),
                pos_max=self.ctx.seq_pos_max(self.seq_id),
            )
        if rows.schema.has_ext:
            _check_text(self.place.schema, rows.cells)
        counts = [p1 - p0] + [0] * (len(self.place.schema.parts) - 1)
        target = lay_out(self.place.schema, counts, 0, True, False, out).base
        assert target is not None
        target.cells[...] = rows.cells
        target.cells["seq_id"] = 0
        copy_all(target.tensors(), rows.tensors())


def _check_text(schema: Schema, cells: npt.NDArray[np.void]) -> None:
    """With M-RoPE, refuse rows of images: their tokens do not say what they are."""
    try:
        check_run(schema, cells["pos"], np.stack([cells[name] for name in ("x", "y", "token")], axis=1))
    except CorruptStateError as error:
        raise TokensMismatchError(f"not a run of text: {error.reason}", n_tokens=len(cells)) from None


def take_partial(ctx: Context, blob: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A ``PARTIAL_ONLY`` blob of this context, as a unified cache would have given it."""
    if ctx.schema.n_stream == 1:
        return np.asarray(blob)
    return layout.parse_sequence(blob, ctx.schema, partial=True).with_unified(1).blob


class Placer:
    """Puts entries into one sequence, under the context's lock. Empties it first.

    Parameters
    ----------
    ctx : Context
        Locked by the caller.
    seq_id : int

    Notes
    -----
    With a spare sequence each piece goes to llama.cpp as it comes; otherwise :meth:`finish` puts all of them together
    and needs the room of the whole state for it.
    """

    def __init__(self, ctx: Context, seq_id: int) -> None:
        self.ctx = ctx
        self.seq_id = seq_id
        self.place = place_of(ctx.schema)
        self._limits = ctx.limits
        self._spare = None
        # what a sequence holds can be put back only if the new state is set in one piece
        if ctx._span(seq_id) == (-1, -1):
            self._spare = spare_sequence(ctx, seq_id)
        self._shared = ctx._handle.shared
        self._pieces: list[SequenceState] = []
        self.n_tokens = 0

    @property
    def needs_room(self) -> bool:
        """Whether the whole state is put together in memory."""
        return self._spare is None and self.place.has_rows

    def add(self, entry: Entry) -> None:
        """Append the rows of an entry.

        Raises
        ------
        LoadError
            It does not fit what is there; the sequence has to be given up (:meth:`abandon`).
        NotEnoughCellsError
            The cache is full.
        """
        if not entry.tail or not self.place.has_rows:
            return
        rows = entry.rows
        if entry.fits != (self.place, self._limits):
            self._check(entry, rows)
        if self._spare is None:
            self._pieces.append(layout.parse_sequence(rows, self.place.schema))
        else:
            self._pass_through(self._spare, entry, rows)
        self.n_tokens = entry.end

    def _check(self, entry: Entry, rows: npt.NDArray[np.uint8]) -> None:
        base = self.place.base
        assert base is not None
        length = rows.nbytes - len(self.place.trailer)
        if length < 0 or rows[length:].tobytes() != self.place.trailer:
            raise CorruptStateError("damaged block: its rows end wrongly", reason="trailer", section="rows")
        info = layout.validate_sequence(rows[:length], base, self._limits)
        if (info.first_pos, info.n_cells, info.src_seq_id) != (entry.start, entry.tail, 0):
            raise CorruptStateError(
                f"damaged block: rows of {info.n_cells} tokens from {info.first_pos} on, not {entry.tail} from "
                f"{entry.start} on",
                reason="positions",
                section="rows",
            )
        entry.fits = (self.place, self._limits)

    def _pass_through(self, spare: int, entry: Entry, rows: npt.NDArray[np.uint8]) -> None:
        try:
            n = state.seq_set_through(self.ctx._handle, rows, spare, self.seq_id)
            problem = None if n == rows.nbytes else log.take_errors() or f"{n} of {rows.nbytes} bytes"
        except LoadError as error:
            problem = str(error)
        if problem is not None:
            raise NotEnoughCellsError(
                f"no room for {entry.tail} tokens after {entry.start}: {problem}",
                reason=problem,
                needed=entry.tail,
                available=0,
            )

    def _empty_spare(self) -> None:
        """The spare sequence shares the cells of the last piece until now."""
        if self._spare is not None:
            memory.seq_rm(self.ctx._handle, self._spare, -1, -1)
            self.ctx._handle.shared = self._shared

    def finish(self, anchor: Entry | None) -> int:
        """Complete the sequence; how many tokens it holds now.

        Parameters
        ----------
        anchor : Entry, optional
            What cannot be cut, after the rows that were added. Its own rows are added here.

        Raises
        ------
        LoadError
            As :meth:`add`.
        """
        if anchor is not None:
            self.add(anchor)
        self._empty_spare()
        if self._spare is None and self.place.has_rows:
            self._set_whole(anchor)
        elif anchor is not None:
            self._set_partial(anchor)
        elif not self.n_tokens:
            memory.seq_rm(self.ctx._handle, self.seq_id, -1, -1)
        held = self.ctx.seq_pos_max(self.seq_id) + 1
        if held != self.n_tokens:
            raise LoadError(f"{held} tokens, not {self.n_tokens}", reason="positions")
        return self.n_tokens

    def _set_partial(self, anchor: Entry) -> None:
        blob = self._own_partial(anchor)
        if self._spare is None:
            # nothing but a recurrent state: as any other
            self.ctx.state_seq_set_data(blob, self.seq_id, SeqFlags.PARTIAL_ONLY)
        else:
            info = layout.validate_sequence(blob, self.ctx.schema, self._limits, partial=True)
            if info.pos_max != anchor.end - 1:
                raise CorruptStateError("damaged block: a state of another length", reason="length", section="partial")
            n = state.seq_set_data(self.ctx._handle, blob, self.seq_id, SeqFlags.PARTIAL_ONLY)
            if n != blob.nbytes or self.ctx._span(self.seq_id) != (info.pos_min, info.pos_max):
                raise LoadError(f"llama.cpp refused the state: {log.take_errors() or 'positions'}", reason="refused")
            self.ctx._handle.forget_outputs(self.seq_id)
        self.n_tokens = anchor.end

    def _own_partial(self, anchor: Entry) -> npt.NDArray[np.uint8]:
        if self.ctx.schema.n_stream == 1:
            return anchor.partial
        piece = layout.parse_sequence(anchor.partial, self.place.schema, partial=True)
        return piece.with_unified(self.ctx.schema.n_stream, self.seq_id).blob

    def _set_whole(self, anchor: Entry | None) -> None:
        if not self._pieces:
            memory.seq_rm(self.ctx._handle, self.seq_id, -1, -1)
            return
        pieces = self._pieces
        if anchor is not None:
            rest = layout.parse_sequence(anchor.partial, self.place.schema, partial=True)
            pieces = _with_rest(pieces, anchor, rest)
        n_stream = self.ctx.schema.n_stream
        own = [p.with_unified(n_stream, self.seq_id if n_stream > 1 else 0) for p in pieces]
        self.ctx.state_seq_set_data(layout.compose(own, seq_id=self.seq_id).blob, self.seq_id)

    def abandon(self) -> None:
        """Empty the sequence, if anything has gone into it."""
        if self._spare is not None:
            memory.seq_rm(self.ctx._handle, self.seq_id, -1, -1)
            self._empty_spare()
        self._pieces.clear()
        self.n_tokens = 0


def _with_rest(pieces: Sequence[SequenceState], anchor: Entry, rest: SequenceState) -> list[SequenceState]:
    """The pieces with window and recurrent state of ``rest`` in the last one."""
    schema = pieces[0].schema
    last = pieces[-1] if anchor.tail else None
    empty = empty_part(schema.parts[0])
    assert isinstance(empty, KVPart)
    base = last.base if last is not None else empty
    parts = tuple(p for p in (base, rest.window, rest.recurrent) if p is not None)
    end = SequenceState(schema, 0, parts)
    return [*(pieces[:-1] if last is not None else pieces), end]


def spans(starts: Iterable[int], block_tokens: int) -> list[tuple[int, int]]:
    """The token ranges of blocks by their numbers."""
    return [(i * block_tokens, (i + 1) * block_tokens) for i in starts]
