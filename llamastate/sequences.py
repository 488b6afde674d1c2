"""Operations on the sequences of a context, made exact or refused."""

from __future__ import annotations

import numpy as np

from llamastate import layout
from llamastate._native import memory, state
from llamastate.arrays import Int32Array, as_index
from llamastate.errors import InvalidPositionError, LlamaStateError
from llamastate.exactness import can_trim
from llamastate.params import I32
from llamastate.probe import shift_problem
from llamastate.restore import copy_sequence
from llamastate.state import StateAPI

__all__ = ["SequenceAPI"]


class SequenceAPI(StateAPI):
    """The memory functions of a :class:`~llamastate.Context`. Not made directly."""

    @property
    def n_seq_max(self) -> int:
        """Number of sequences (``llama_n_seq_max``)."""
        return self._handle.n_seq_max

    def seq_pos_min(self, seq_id: int) -> int:
        """Smallest position in a sequence's memory, -1 if empty (``llama_memory_seq_pos_min``).

        With a sliding window it is the window's, so it grows as the window moves on.
        """
        return memory.seq_pos_min(self._handle, seq_id)

    def seq_pos_max(self, seq_id: int) -> int:
        """Largest position in a sequence's memory, -1 if empty (``llama_memory_seq_pos_max``)."""
        return memory.seq_pos_max(self._handle, seq_id)

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> bool:
        """Remove positions ``[p0, p1)`` from a sequence (``llama_memory_seq_rm``).

        Parameters
        ----------
        seq_id : int
        p0, p1 : int
            Negative means from the beginning, to the end.

        Returns
        -------
        bool
            False if what remains would not be exact; nothing has changed then. llama.cpp says true when a sliding
            window no longer reaches back far enough; this does not.

        Notes
        -----
        Removing everything always works. Recurrent and hybrid models can remove nothing less. O(cells), no bytes
        copied.

        Removing from the middle leaves tokens that have seen what is gone: an approximation by nature, as no text would
        give the same. A state with such a hole can be taken but not restored, until :meth:`seq_add` has closed it.
        """
        p0, p1 = _range(p0, p1)
        with self._handle as handle:
            low, high = self._span(seq_id)
            to_end = p1 < 0 or p1 > high
            if p0 <= 0 and to_end:
                handle.forget_outputs(seq_id)
                return memory.seq_rm(handle, seq_id, -1, -1)
            if p0 > high or 0 <= p1 <= max(p0, 0):
                return True  # nothing there to remove
            if to_end:
                exact = can_trim(self.model.memory_kind, self.model.n_swa, low, high, p0)
            else:
                # what lies before the hole has to be exact by itself: a later trim may make it the end
                kind = self.model.memory_kind
                exact = kind in ("attention", "iswa") and can_trim(kind, self.model.n_swa, low, high, p0)
            if not exact:
                return False
            handle.forget_outputs(seq_id)
            return memory.seq_rm(handle, seq_id, p0, p1)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Make ``dst`` a copy of ``src``, or of its positions ``[p0, p1)`` (``llama_memory_seq_cp``).

        Parameters
        ----------
        src, dst : int
        p0, p1 : int
            Negative means from the beginning, to the end. A copy from the beginning replaces ``dst``; any other part
            goes onto a ``dst`` that is empty or ends where the part begins.

        Raises
        ------
        InvalidPositionError
            A part that cannot be copied exactly: of a recurrent state, of a window that no longer reaches that far,
            (when the cache is not unified) one that does not begin at 0, or one that does not follow what ``dst`` has.

        Notes
        -----
        In a unified cache both share the cells: nothing is copied. Otherwise every byte is copied at once; llama.cpp
        would put that off to the next decode, and states taken meanwhile would be wrong.
        """
        p0, p1 = _range(p0, p1)
        with self._handle as handle:
            low, high = self._span(src)
            end = self._span(dst)[1]
            if src == dst:
                return
            whole = p0 <= 0 and (p1 < 0 or p1 > high)
            kind = self.model.memory_kind
            follows = p0 <= 0 or end in (-1, p0 - 1)
            if not whole and not (follows and self._can_copy_part(low, high, p0, p1)):
                raise InvalidPositionError(
                    f"positions [{p0}, {p1}) of sequence {src} cannot be copied exactly to sequence {dst}",
                    reason=kind if follows else "does not follow",
                    value=(p0, p1),
                    limit=high if follows else end,
                )
            if self._params.get("kv_unified") or kind == "recurrent":
                handle.forget_outputs(dst)
                if p0 <= 0:
                    memory.seq_rm(handle, dst, -1, -1)
                memory.seq_cp(handle, src, dst, p0, p1)
                return
            self._refuse_pending("seq_cp", src)
            if whole:
                copy_sequence(self, src, dst)
                return
            blob = np.empty(state.seq_get_size(handle, src, 0), np.uint8)
            state.seq_get_data_into(handle, blob, src, 0)
            part = layout.parse_sequence(blob.data, self.schema).slice(0, p1)
            self.state_seq_set_data(part.to_bytes(), dst)

    def _can_copy_part(self, low: int, high: int, p0: int, p1: int) -> bool:
        kind = self.model.memory_kind
        if kind == "attention":
            return bool(self._params.get("kv_unified")) or p0 <= 0
        if kind == "iswa":
            return bool(self._params.get("kv_unified")) and p0 <= 0 and can_trim(kind, self.model.n_swa, low, high, p1)
        return False

    def seq_keep(self, seq_id: int) -> None:
        """Empty every other sequence (``llama_memory_seq_keep``)."""
        with self._handle as handle:
            self._span(seq_id)
            handle.forget_outputs(keep=seq_id)
            for seq in range(handle.n_seq_max):
                if seq != seq_id:
                    # one by one: llama.cpp's own function keeps whatever lies in another stream
                    memory.seq_rm(handle, seq, -1, -1)

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Move positions ``[p0, p1)`` by ``delta`` (``llama_memory_seq_add``).

        Parameters
        ----------
        seq_id : int
        p0, p1 : int
            Negative means from the beginning, to the end.
        delta : int
            No position may become negative.

        Raises
        ------
        InvalidPositionError
            A position would become negative or leave 32 bits, or this model's positions cannot be moved, or not those
            of this context: llama.cpp turns keys of f16 and f32 only, and with YaRN it would rescale those of every
            sequence.
        PendingUpdateError
            It shares cells with another sequence, because one was copied to the other after positions were moved and
            before the next decode.
        NotEnoughCellsError
            There is no room for a copy of the cells that it shares. In all three cases nothing has changed.

        Notes
        -----
        The keys are turned at the next decode, of whatever sequence; until then the state of this one (and of what was
        copied from it meanwhile) cannot be taken, and neither can the whole context's (:class:`PendingUpdateError`),
        unless it is emptied or replaced. It may be moved again before. What comes of it is an approximation by nature:
        no decode from scratch would give the same. Cells that the sequence shares with others are copied first.
        """
        p0, p1 = _range(p0, p1)
        delta = as_index(delta, "delta", InvalidPositionError)
        with self._handle as handle:
            low, high = self._movable(seq_id, p0, p1)
            if high >= low and not (low + delta >= 0 and high + delta < I32):
                raise InvalidPositionError(
                    f"moving [{low}, {high}] by {delta} leaves [0, {I32})",
                    reason="out of range",
                    value=delta,
                    limit=-low,
                )
            if high >= low and delta:
                self._unshare("seq_add", seq_id)
                handle.forget_outputs(seq_id)
                memory.seq_add(handle, seq_id, p0, p1, delta)

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int) -> None:
        """Divide positions ``[p0, p1)`` by ``d`` (``llama_memory_seq_div``); as :meth:`seq_add` in all else.

        Parameters
        ----------
        seq_id : int
        p0, p1 : int
        d : int
            At least 1.
        """
        if not 1 <= as_index(d, "d", InvalidPositionError) <= I32:
            raise InvalidPositionError(f"positions cannot be divided by {d}", reason="divisor", value=d, limit=1)
        p0, p1 = _range(p0, p1)
        with self._handle as handle:
            low, high = self._movable(seq_id, p0, p1)
            if high >= low and d > 1:
                self._unshare("seq_div", seq_id)
                handle.forget_outputs(seq_id)
                memory.seq_div(handle, seq_id, p0, p1, d)

    def _movable(self, seq_id: int, p0: int, p1: int) -> tuple[int, int]:
        """Return the smallest and largest position of a range that is there, or refuse a model that cannot shift."""
        low, high = self._span(seq_id)
        # To shift a cache without layers (all others have a window) llama.cpp makes an input that nothing reads, and
        # aborts when it comes to fill it in.
        hollow = any(isinstance(part, layout.KVSchema) and not part.k for part in self.schema.parts)
        if self._handle.m_rope or hollow or not memory.can_shift(self._handle):
            raise InvalidPositionError("this model's positions cannot be moved", reason="no shift", value=(p0, p1))
        problem = shift_problem(self.model, self._handle, self.schema, self._params)
        if problem:
            raise InvalidPositionError(
                f"positions cannot be moved in this context: {problem}", reason="no shift", value=(p0, p1)
            )
        return max(0 if self.model.memory_kind == "iswa" else low, p0), high if p1 < 0 else min(high, p1 - 1)

    def _unshare(self, operation: str, seq_id: int) -> None:
        """Give a sequence cells of its own. Moving the position of a shared cell would move the others' too."""
        shares = self._params.get("kv_unified") or self.model.memory_kind == "recurrent"
        if seq_id not in self._handle.shared or not shares or self.n_seq_max == 1:
            return
        self._refuse_pending(operation, seq_id)
        copy_sequence(self, seq_id, seq_id)

    def _free_window(self, seq_ids: Int32Array) -> bool:
        """Give back window cells that nobody needs and llama.cpp keeps; whether there were any.

        A cell that has left the window of its only sequence is used again. One that several sequences share is not, so
        copies of a sequence fill the window's cache with the past. A sequence of its own takes none of those along.
        """
        handle = self._handle
        if not (self.model.n_swa and handle.shared and self._params.get("kv_unified")):
            return False
        try:
            for seq_id in {int(s) for s in seq_ids}:
                self._unshare("decode", seq_id)
        except LlamaStateError:
            return False  # as full as it says
        return True

    def clear(self, *, data: bool = True) -> None:
        """Empty every sequence (``llama_memory_clear``); with ``data``, the tensors are zeroed too."""
        with self._handle as handle:
            handle.forget_outputs()
            memory.clear(handle, data)


def _range(p0: int, p1: int) -> tuple[int, int]:
    """Check the ends of a range of positions; any negative number becomes -1, which stands for the open end."""
    return _end("p0", p0), _end("p1", p1)


def _end(name: str, value: int) -> int:
    end = as_index(value, name, InvalidPositionError)
    if not -I32 <= end <= I32:
        raise InvalidPositionError(f"{name} = {end} does not fit 32 bits", reason=name, value=end, limit=I32)
    return end if end >= 0 else -1
