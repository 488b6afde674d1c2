"""What the positions in a blob must be like, taken by themselves.

A sequence's positions are one run without gap or double, but for images under M-RoPE, and a window cache reaches back
as far as the next token looks.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from llamastate.errors import CorruptStateError
from llamastate.layout.schema import Schema

__all__ = ["POS_END", "Rules", "check_run", "check_window", "fail", "loose_positions", "run_positions"]

# HunyuanVL numbers an image's cells one after the other and keeps (row, column) in x and y.
_FREE_2D_ARCHS = frozenset({"hunyuan_vl"})

POS_END = 2**31 - 1
"""Positions stay below, so that the next one still is an int32."""


class Rules(NamedTuple):
    """How positions and cell extras hang together: rectangles (M-RoPE images), or plain runs."""

    rectangles: bool
    ext_is_zero: bool

    @classmethod
    def of(cls, schema: Schema) -> Rules:
        """The rules of one model."""
        free = schema.arch in _FREE_2D_ARCHS
        return cls(rectangles=schema.m_rope and not free, ext_is_zero=not schema.m_rope and not free)


def run_positions(
    pos: NDArray[np.int32],
    ext: NDArray[np.int32] | None,
    offset: int | None,
    n_vocab: int | None,
    rules: Rules,
    section: str,
) -> NDArray[np.int32]:
    """One sequence's positions in one cache, sorted: ``int32[n]``.

    They are whole runs without gap or double. With M-RoPE the cells of an image share one position and form a rectangle
    of x and y, after which the next position is free.
    """
    if ext is not None:
        _extras(ext, offset, n_vocab, rules, section)
        if rules.rectangles and not bool((ext[:, :2] == pos[:, None]).all()):
            return _rectangles(pos, ext, offset, section)
    # Nearly always the cells come in order, and then this is all.
    low = int(pos[0])
    if low >= 0 and low + len(pos) <= POS_END and np.array_equal(pos, np.arange(low, low + len(pos), dtype=np.int32)):
        return pos
    ordered = np.sort(pos)
    if int(ordered[0]) < 0:
        i = int((pos < 0).argmax())
        fail(section, f"cell {i} has position {int(pos[i])}", offset)
    if int(ordered[-1]) >= POS_END:
        fail(section, f"position {int(ordered[-1])} leaves no room for the next", offset)
    step = np.diff(ordered)
    if (step != 1).any():
        i = int((step != 1).argmax())
        here, there = int(ordered[i]), int(ordered[i + 1])
        what = f"position {here} comes twice" if here == there else f"positions {here + 1} to {there - 1} are missing"
        fail(section, what, offset)
    return ordered


def _extras(
    ext: NDArray[np.int32],
    offset: int | None,
    n_vocab: int | None,
    rules: Rules,
    section: str,
) -> None:
    """x, y and token of each cell are in range."""
    tokens = ext[:, 2]
    if n_vocab is not None:
        bad = (tokens < -1) | (tokens >= n_vocab)
        if bad.any():
            fail(section, f"token {int(tokens[int(bad.argmax())])} is not in [-1, {n_vocab})", offset)
    if rules.ext_is_zero and ext[:, :2].any():
        fail(section, "2-D positions in the cells of a model that has none", offset)
    if int(ext[:, :2].min()) < 0:
        fail(section, "a negative 2-D position", offset)


def _rectangles(pos: NDArray[np.int32], ext: NDArray[np.int32], offset: int | None, section: str) -> NDArray[np.int32]:
    """Positions of a sequence with images: groups of cells of one position, each a full rectangle."""
    order = np.lexsort((ext[:, 0], ext[:, 1], pos))
    p = pos[order].astype(np.int64)
    x = ext[order, 0].astype(np.int64) - p
    y = ext[order, 1].astype(np.int64) - p
    if int(p[0]) < 0 or int(p[-1]) >= POS_END:
        fail(section, f"positions {int(p[0])} to {int(p[-1])}", offset)
    first = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
    size = np.diff(np.r_[first, len(p)])
    # In a rectangle the last cell in (y, x) order has the largest x and y.
    width = x[first + size - 1] + 1
    height = y[first + size - 1] + 1
    group = np.repeat(np.arange(len(first)), size)
    index = np.arange(len(p)) - first[group]
    full = (width >= 1) & (height >= 1) & (width * height == size)
    bad = ~full[group]
    w = np.maximum(width, 1)[group]
    bad |= (x != index % w) | (y != index // w)
    if bad.any():
        at = int(p[int(bad.argmax())])
        fail(section, f"the cells at position {at} form no rectangle that begins there", offset)
    gap = np.diff(p[first]) != np.maximum(width, height)[:-1]
    if gap.any():
        i = int(gap.argmax())
        fail(section, f"positions {int(p[first[i]])} and {int(p[first[i + 1]])} do not follow on each other", offset)
    return np.asarray(p, np.int32)


def loose_positions(
    pos: NDArray[np.int32],
    ext: NDArray[np.int32] | None,
    offset: int,
    n_vocab: int,
    rules: Rules,
    name: str,
    seq_id: int,
) -> NDArray[np.int32]:
    """One sequence's positions in a part that need not be a whole run, sorted: ``int32[n]``.

    Of a window cache, cells that no token will look at any more may be gone in parts.
    """
    section = f"{name}.cells of sequence {seq_id}"
    if name == "recurrent" and len(pos) != 1:
        fail(section, f"a sequence has one recurrent cell, not {len(pos)}", offset)
    if ext is not None:
        _extras(ext, offset, n_vocab, rules, section)
    ordered = np.sort(pos)
    if int(ordered[0]) < 0 or int(ordered[-1]) >= POS_END:
        fail(section, f"positions {int(ordered[0])} to {int(ordered[-1])}", offset)
    if not rules.rectangles:
        step = np.diff(ordered)
        if (step == 0).any():
            fail(section, f"position {int(ordered[int((step == 0).argmax())])} comes twice", offset)
    return ordered


def check_run(schema: Schema, pos: NDArray[np.int32], ext: NDArray[np.int32] | None) -> NDArray[np.int32]:
    """Check the positions (and 2-D positions) of one sequence's base cache and return them sorted: ``int32[n]``.

    Raises
    ------
    CorruptStateError
        Negative, missing or double positions, or images that form no rectangle.
    """
    return run_positions(pos, ext, None, None, Rules.of(schema), "base.cells")


def check_window(
    schema: Schema,
    base: NDArray[np.int32] | None,
    window: NDArray[np.int32],
    first_pos: int = 0,
    offset: int | None = None,
    section: str = "window.cells",
) -> None:
    """The window cache holds every cell that the next token will look at, and nothing that the base does not.

    llama.cpp restores an incomplete window and then attends to what is left of it.

    Parameters
    ----------
    schema : Schema
        Says how wide the window is and how it slides.
    base : int32[n] or None
        Sorted positions of the base cache; None if they are not at hand (``PARTIAL_ONLY``).
    window : int32[m]
        Sorted positions of the window cache.
    first_pos : int
        Stands for the first of ``base``, when that is None.
    offset, section : int, str
        For the error.

    Raises
    ------
    CorruptStateError
        It does not.
    """
    if not len(window):
        fail(section, "the window is empty", offset)
    last = int(window[-1])
    if base is not None:
        if last != int(base[-1]):
            fail(section, f"the window ends at position {last}, the base at {int(base[-1])}", offset)
        if int(window[0]) < int(base[0]):
            fail(section, f"the window begins at {int(window[0])}, before the base at {int(base[0])}", offset)
    start = schema.window_start(last + 1)
    if base is None:
        incomplete = int(window[0]) > max(first_pos, min(start, last))
    else:
        # Compared cell by cell, because with images not every position has one.
        have = window[np.searchsorted(window, start) :]
        need = base[np.searchsorted(base, start) :]
        incomplete = not np.array_equal(have, need)
    if incomplete:
        fail(
            section,
            f"the window is incomplete: it holds positions {int(window[0])} to {last} and the next token needs all "
            f"from {start}",
            offset,
        )


def fail(section: str, reason: str, offset: int | None) -> NoReturn:
    """Raise :class:`CorruptStateError`."""
    where = "" if offset is None else f" at byte {offset}"
    raise CorruptStateError(
        f"corrupt state{where} ({section}): {reason}", reason=reason, offset=offset, section=section
    )
