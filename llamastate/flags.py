"""Flags of the state functions."""

from __future__ import annotations

from enum import IntFlag

from llamastate._native import consts

__all__ = ["SeqFlags"]


class SeqFlags(IntFlag):
    """What part of a sequence's state is meant, and where its tensors go (``LLAMA_STATE_SEQ_FLAGS_*``).

    Attributes
    ----------
    NONE
        Everything.
    PARTIAL_ONLY
        Only what cannot be trimmed: the sliding window's cells, the recurrent state. A model with full attention has
        no such part; its partial state is the whole one.
    SWA_ONLY
        llama.cpp's older name for ``PARTIAL_ONLY``.
    ON_DEVICE
        The tensors stay in buffers of the context; the blob holds only the cells. Taking a sequence's state again
        invalidates the one before.
    """

    NONE = consts.FLAG_NONE
    PARTIAL_ONLY = consts.FLAG_PARTIAL_ONLY
    SWA_ONLY = consts.FLAG_SWA_ONLY
    ON_DEVICE = consts.FLAG_ON_DEVICE
