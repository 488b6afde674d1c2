"""Replacing the state of one sequence without being able to lose the old one.

llama.cpp empties a sequence before it looks for cells for the new state. If there are not enough it reports failure,
and the old state is gone. In a pool that sequences share that cannot be mended afterwards: the old cells may
have been shared with others, and a copy with cells of its own may not fit where the sharing one did. So whether there
is room is settled before anything is touched. Mostly it is obvious; where it is not, the cells are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llamastate._native import log, memory, state
from llamastate.errors import LoadError, NotEnoughCellsError
from llamastate.flags import SeqFlags
from llamastate.layout.schema import KVSchema
from llamastate.layout.validate import SequenceInfo
from llamastate.layout.walk import Span, walk_context, walk_sequence

if TYPE_CHECKING:
    from llamastate.layout import Limits, Schema
    from llamastate.state import StateAPI

__all__ = [
    "Room",
    "cells_of_others",
    "check_base",
    "copy_sequence",
    "count_room",
    "put_back",
    "put_own",
    "replace_sequence",
]


class Room(NamedTuple):
    """Cells that a sequence could have if it were emptied first, and the context's state if it can be put back."""

    base: int
    window: int
    blob: npt.NDArray[np.uint8] | None

    def takes(self, n: int, limits: Limits) -> bool:
        """Whether the state of ``n`` tokens would find room, in cells that it shares with nobody."""
        return n <= self.base and min(n, limits.window_cells) <= self.window


def check_base(ctx: StateAPI, info: SequenceInfo, dest: int) -> None:
    """Refuse a partial state for a sequence that is shorter than it.

    A partial state is only the window or the recurrent part. Without the attention rows of every token up to its own
    position the sequence would be wrong, and llama.cpp would not notice.
    """
    base = next((p for p in ctx.schema.parts if isinstance(p, KVSchema) and p.role == "base"), None)
    if base is None:
        return  # all of the memory is recurrent: there is nothing that could be too short
    # llama.cpp tells the span of the window only. But without tensors a part is its fixed bytes and a record a
    # cell, and the sizes with and without the base part differ by just that.
    whole = state.seq_get_size(ctx._handle, dest, SeqFlags.ON_DEVICE)
    rest = state.seq_get_size(ctx._handle, dest, SeqFlags.ON_DEVICE | SeqFlags.PARTIAL_ONLY)
    have = max(0, whole - rest - base.fixed_bytes) // base.record_bytes
    if have < info.pos_max + 1:
        raise LoadError(
            f"a partial state at position {info.pos_max} needs the {info.pos_max + 1} tokens before it in sequence "
            f"{dest}, which holds {have}",
            reason="the sequence is shorter than the partial state",
        )


def replace_sequence(
    ctx: StateAPI, view: memoryview, info: SequenceInfo, dest: int, flags: int, *, partial: bool
) -> None:
    """Put a validated state in the place of what ``dest`` holds.

    Parameters
    ----------
    ctx : StateAPI
        Locked by the caller.
    view : memoryview
        The blob, with the header that it has in memory.
    info : SequenceInfo
        What validation found in it.
    dest : int
    flags : int
    partial : bool
        Whether the blob holds only what cannot be trimmed; what comes after its position in ``dest`` is removed then.

    Raises
    ------
    NotEnoughCellsError, LoadError
        ``dest`` is as it was, or ``removed`` says that it is empty.
    """
    handle = ctx._handle
    empty = ctx._span(dest) == (-1, -1)
    # Onto positions that were moved, or cells of images, a partial state may turn out not to fit what is before it
    uncertain = partial and (handle.moved_cells or ctx.schema.m_rope)
    room = None if empty or (_obviously_fits(ctx, info, dest) and not uncertain) else count_room(ctx, dest)
    if room is not None:
        for needed, available in ((info.n_cells, room.base), (info.n_window_cells, room.window)):
            if needed > available:
                raise _not_enough(needed, available)
    handle.forget_outputs(dest)
    changes = handle.changes.count(dest)
    if not partial or info.is_empty:
        # llama.cpp skips a part that the blob has empty, and would leave the old cells in it. A partial state of an
        # empty sequence means an empty sequence: everything comes after its position.
        memory.seq_rm(handle, dest, -1, -1)
    try:
        problem = _set(ctx, view, info, dest, flags, partial=partial)
    except BaseException:
        put_back(ctx, dest, room)
        raise
    if problem is None:
        return
    put_back(ctx, dest, room)
    if empty or (room is not None and room.blob is not None):
        handle.changes.set_back(dest, changes)
    if empty and not partial:
        available = ctx.limits.base_cells - cells_of_others(ctx, dest)
        if info.n_cells > available:
            raise _not_enough(info.n_cells, max(0, available))
    # Validated, with room for it, and refused all the same: no way to this is known. Where no copy was taken (it would
    # double the cost of every restore) the sequence is empty now, which is better than wrong, and the error says so.
    lost = (room is None or room.blob is None) and not empty
    tail = f"; sequence {dest} is empty now" if lost else ""
    raise LoadError(f"llama.cpp refused the state: {problem}{tail}", reason=problem, removed=(dest,) if lost else ())


def put_own(ctx: StateAPI, blob: npt.NDArray[np.uint8], dest: int, n_tokens: int) -> bool:
    """Put a partial state back that was taken from this sequence, or validated for it, and has not changed since.

    What is known already is not looked at again: to validate the bytes and to count the rows before them takes longer
    than llama.cpp does to set a small state.

    Parameters
    ----------
    ctx : StateAPI
    blob : uint8[n]
    dest : int
        A sequence that begins with the ``n_tokens`` tokens of the state; of a recurrent model any.
    n_tokens : int

    Returns
    -------
    bool
        False if this takes the careful way (:meth:`StateAPI.state_seq_set_data`); nothing has changed then.

    Raises
    ------
    LoadError
        ``dest`` is empty now.
    """
    schema = ctx.schema
    with ctx._handle as handle:
        usual = schema.has_partial or schema.kind == "recurrent"
        if handle.moved_cells or schema.m_rope or not usual:
            return False
        # only a window needs cells; a recurrent state has its place
        if schema.n_swa and not _obviously_fits(ctx, _of_window(schema, n_tokens, blob.nbytes, dest), dest):
            return False
        handle.forget_outputs(dest)
        try:
            n = state.seq_set_data(handle, blob, dest, SeqFlags.PARTIAL_ONLY)
            memory.seq_rm(handle, dest, n_tokens, -1)
            high = memory.seq_pos_max(handle, dest)
            # of a hybrid model the smallest position is the recurrent state's: it tells nothing of a window
            low = memory.seq_pos_min(handle, dest) if schema.kind == "iswa" else 0
        except BaseException:
            memory.seq_rm(handle, dest, -1, -1)
            raise
        if n != blob.nbytes or high != n_tokens - 1 or low > schema.window_start(n_tokens):
            memory.seq_rm(handle, dest, -1, -1)
            problem = log.take_errors() or f"it read {n} of {blob.nbytes} bytes; positions {low} to {high}"
            raise LoadError(
                f"llama.cpp refused the state: {problem}; sequence {dest} is empty now", reason=problem, removed=(dest,)
            )
    return True


def _of_window(schema: Schema, n_tokens: int, n_bytes: int, dest: int) -> SequenceInfo:
    """What validation says of a partial state after ``n_tokens`` tokens, as far as room is concerned."""
    return SequenceInfo(
        src_seq_id=dest,
        n_cells=0,
        n_window_cells=min(n_tokens, schema.n_swa),
        has_recurrent=True,
        pos_min=-1,
        pos_max=n_tokens - 1,
        first_pos=-1,
        n_bytes=n_bytes,
    )


def copy_sequence(ctx: StateAPI, src: int, dest: int) -> None:
    """Put the state of ``src`` into cells that belong to ``dest`` alone; ``src`` itself gets cells of its own so.

    Not validated as others are: what was just taken from the same place is what it is, positions that are missing or
    come twice (:meth:`Context.seq_rm` of a part, :meth:`Context.seq_div`) and all.

    Raises
    ------
    NotEnoughCellsError
        Nothing has changed.
    """
    blob = np.empty(state.seq_get_size(ctx._handle, src, 0), np.uint8)
    state.seq_get_data_into(ctx._handle, blob, src, 0)
    cells = {"base": 0, "window": 0}
    lows = {}
    for part, span in zip(ctx.schema.parts, walk_sequence(blob.data, ctx.schema).spans, strict=True):
        if span is not None and len(span.cells.pos):
            lows[part.name] = int(span.cells.pos.min())
            if isinstance(part, KVSchema):
                cells[part.role] = len(span.cells.pos)
    if "window" in lows:
        lows.pop("base", None)  # what is asked for the smallest position is the window's cache
    info = SequenceInfo(
        src_seq_id=src,
        n_cells=cells["base"],
        n_window_cells=cells["window"],
        has_recurrent=any(not isinstance(part, KVSchema) for part in ctx.schema.parts),
        pos_min=max(lows.values(), default=-1),
        pos_max=ctx._span(src)[1],
        first_pos=-1,
        n_bytes=blob.nbytes,
    )
    replace_sequence(ctx, blob.data, info, dest, 0, partial=False)


def put_back(ctx: StateAPI, dest: int, room: Room | None) -> None:
    """Empty a sequence that is half overwritten, and put the state of before in its place if there is a copy."""
    memory.seq_rm(ctx._handle, dest, -1, -1)
    if room is not None and room.blob is not None:
        state.set_data(ctx._handle, room.blob, dest)
        ctx._handle.forget_outputs()


def _set(ctx: StateAPI, view: memoryview, info: SequenceInfo, dest: int, flags: int, *, partial: bool) -> str | None:
    """Set the state and compare what came of it with what was meant; what is wrong, or ``None``."""
    handle = ctx._handle
    if info.is_empty:
        return None  # emptied already, and that is all there is to it
    try:
        n = state.seq_set_data(handle, view, dest, flags)
    except LoadError as error:
        return str(error)
    if partial:
        memory.seq_rm(handle, dest, info.pos_max + 1, -1)
    if n != view.nbytes:
        return log.take_errors() or f"it read {n} of {view.nbytes} bytes"
    held = ctx._span(dest)
    return None if held == (info.pos_min, info.pos_max) else f"positions {held}, not {(info.pos_min, info.pos_max)}"


def _obviously_fits(ctx: StateAPI, info: SequenceInfo, dest: int) -> bool:
    """Whether nothing that other sequences hold can be in the way. The sequence's own cells become free."""
    if ctx._handle.n_seq_max == 1 or not ctx._params.get("kv_unified"):
        return True  # validation has compared the state with the whole cache
    if ctx.schema.m_rope or ctx._handle.moved_cells:
        return False  # more cells than positions: images, or positions that were divided. Spans do not count them
    others = cells_of_others(ctx, dest)
    limits = ctx.limits
    return info.n_cells + others <= limits.base_cells and info.n_window_cells + others <= limits.window_cells


def cells_of_others(ctx: StateAPI, dest: int) -> int:
    """At most how many cells all other sequences hold: those that several share are counted for each."""
    handle = ctx._handle
    with handle:
        return sum([memory.seq_pos_max(handle, seq) + 1 for seq in range(handle.n_seq_max) if seq != dest])


def count_room(ctx: StateAPI, dest: int) -> Room:
    """Count the cells that are free, or would be if ``dest`` were emptied.

    Costs a copy of the whole context's state: nothing else in llama.cpp's interface tells which cells are shared.
    """
    handle = ctx._handle
    blob = np.empty(state.get_size(handle), np.uint8)
    state.get_data_into(handle, blob)
    schema, limits = ctx.schema, ctx.limits
    room = {"base": limits.base_cells, "window": limits.window_cells}
    for part, spans in zip(schema.parts, walk_context(blob.data, schema).parts, strict=True):
        if isinstance(part, KVSchema):
            room[part.role] -= sum(_kept(span, part, schema, dest) for span in spans)
    # Where positions were moved and the keys not turned yet, the copy has the one without the other: good for counting
    return Room(room["base"], room["window"], None if handle.shifted else blob)


def _kept(span: Span, part: KVSchema, schema: Schema, dest: int) -> int:
    """How many cells llama.cpp would not give away after ``dest`` has been emptied (``llama_kv_cache::find_slot``)."""
    cells = span.cells
    alone = cells.counts == 1
    first = np.cumsum(cells.counts) - cells.counts
    owner = cells.ids[first]
    free = alone & (owner == dest)
    if part.role == "window":
        # a cell that has left the window of its only sequence may be taken as well
        for seq in np.unique(owner[alone]):
            mine = alone & (owner == seq)
            free |= mine & (cells.pos < schema.window_start(int(cells.pos[mine].max()) + 1))
    return int((~free).sum())


def _not_enough(needed: int, available: int) -> NotEnoughCellsError:
    return NotEnoughCellsError(
        f"the state takes {needed} cells, {available} can be had", reason="no room", needed=needed, available=available
    )
