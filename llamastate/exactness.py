"""When an operation on a sequence leaves it exact, and when llama.cpp only says so.

A sliding window forgets: its cache keeps the last ``n_swa`` positions (and whatever older ones nobody has needed the
room of yet). Going back to an earlier position is exact only while the cells that the window of that position needs
are still there. ``llama_memory_seq_rm`` answers true either way. A recurrent state cannot go back at all.
"""

from __future__ import annotations

__all__ = ["can_trim"]


def can_trim(kind: str, n_swa: int, pos_min: int, pos_max: int, p0: int) -> bool:
    """Whether removing every position from ``p0`` on leaves the state of the ``p0`` tokens before it.

    Parameters
    ----------
    kind : str
        :attr:`Model.memory_kind`.
    n_swa : int
        Width of the sliding window.
    pos_min, pos_max : int
        What the sequence holds now (``llama_memory_seq_pos_min`` and ``_max``); -1 when empty.
    p0 : int
        The first position to go.

    Notes
    -----
    For sliding windows: after trimming to ``p0`` the next token sees positions from ``p0 - n_swa + 1`` on, so the
    window cache has to reach back that far. ``pos_min`` of such a sequence is its window cache's.
    """
    if p0 > pos_max or p0 <= 0:
        return True  # nothing to remove, or everything
    if kind in ("recurrent", "hybrid", "hybrid-iswa"):
        return False
    if kind == "iswa":
        return pos_min <= max(0, p0 - n_swa + 1)
    return True
