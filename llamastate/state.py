"""The state API: twelve functions of ``llama.h``, made so that they cannot hurt.

Saving is simple: the bytes move once, from llama.cpp's memory to the caller's. Restoring follows one discipline
(:meth:`StateAPI.state_seq_set_data`), because llama.cpp checks little, reports success for states that are wrong, and
leaves a sequence half overwritten when it refuses one:

1. Every byte that decides a position, a sequence id, a type, a size or a count is checked against the model and the
   context before anything is touched (``llamastate.layout``).
2. That its cells fit is proved, or counted, before the old ones go (``llamastate.restore``).
3. The destination is emptied, the state set, and the number of bytes read and the positions compared with what the
   blob said.
4. On any doubt what was there is put back, and an error raised. Where no copy of it was taken, because that would
   double the cost of every restore, the sequence is left empty, and the error's ``removed`` says so. Validation leaves
   no known way to get there.
"""

from __future__ import annotations

import os
import struct
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from llamastate import device, layout, restore
from llamastate._native import log, memory, state
from llamastate.arrays import Int32Array, TokensLike, as_bytes_view, as_tokens
from llamastate.errors import (
    CorruptStateError,
    LoadError,
    PendingUpdateError,
)
from llamastate.flags import SeqFlags
from llamastate.probe import context_limits, context_schema
from llamastate.statefiles import MappedFile, naming, save

if TYPE_CHECKING:
    from llamastate._native.handles import ContextHandle
    from llamastate.layout import Limits, Schema
    from llamastate.model import Model

__all__ = ["StateAPI"]

#: What stands in front of a sequence's state in memory (magic, sequence id), and not in its file.
_SEQ_HEADER = struct.Struct("<Ii")
SEQ_HEADER = _SEQ_HEADER.size


class StateAPI:
    """The state functions of a :class:`~llamastate.Context`. Not made directly."""

    _handle: ContextHandle
    _params: dict[str, Any]
    model: Model
    _schema_cache: Schema | None = None

    # --- what a blob has to look like ---------------------------------------------------------------------------------

    @property
    def schema(self) -> Schema:
        """The layout that every blob of this context has. Found out at the first use (``llamastate.probe``)."""
        if self._schema_cache is None:
            self._schema_cache = context_schema(self.model, self._handle, self._params)
        return self._schema_cache

    @property
    def limits(self) -> Limits:
        """How many sequences and cells there are."""
        return context_limits(
            self._handle, self.schema.n_swa, bool(self._params.get("swa_full")), bool(self._params.get("kv_unified"))
        )

    # --- whole context ------------------------------------------------------------------------------------------------

    def state_get_size(self) -> int:
        """Bytes that the whole context's state takes now (``llama_state_get_size``). O(cells)."""
        n: int = state.get_size(self._handle)
        return n

    def state_get_data(self) -> npt.NDArray[np.uint8]:
        """Copy the whole context's state into a new array (``llama_state_get_data``).

        Returns
        -------
        uint8[n]
        """
        with self._handle:
            out = np.empty(self.state_get_size(), np.uint8)
            self.state_get_data_into(out)
            return out

    def state_get_data_into(self, out: Any) -> int:
        """Copy the whole context's state into ``out`` (``llama_state_get_data``).

        Parameters
        ----------
        out : buffer
            Writable, contiguous, of any type, of at least :meth:`state_get_size` bytes.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        BufferTooSmallError
            Nothing was written. ``needed`` and ``got`` are bytes.
        InvalidBufferError
            Read-only or not contiguous.
        PendingUpdateError
            Positions of a sequence were shifted and nothing has been decoded since.

        Notes
        -----
        Moves every byte once; the GIL is free meanwhile.
        """
        with self._handle as handle:
            self._refuse_pending("state_get_data")
            n: int = state.get_data_into(handle, out)
            return n

    def state_set_data(self, src: Any) -> int:
        """Replace the whole context's state (``llama_state_set_data``).

        Parameters
        ----------
        src : buffer
            What :meth:`state_get_data` gave for a context of the same model and cache settings. Not copied.

        Returns
        -------
        int
            Bytes read: all of them.

        Raises
        ------
        LoadError
            One of its subclasses says why; the context is as it was. The one exception is a state that passes
            validation and that llama.cpp refuses all the same, to which no way is known: the context is empty then,
            and ``removed`` lists the sequences that held something.

        Notes
        -----
        Moves every byte once. No copy of the old state is taken: it would double cost and memory.
        """
        with as_bytes_view(src) as view, self._handle as handle:
            before = [seq for seq in range(handle.n_seq_max) if self._span(seq) != (-1, -1)]
            info = layout.validate_context(view, self.schema, self.limits)
            n = state.set_data(handle, view)
            handle.forget_outputs()
            held = {seq: self._span(seq) for seq in range(handle.n_seq_max)}
            wanted = {seq: info.sequences.get(seq, (-1, -1)) for seq in held}
            if n != view.nbytes or any(held[seq][1] != wanted[seq][1] for seq in held):
                # Validation leaves no known way to get here. Should one exist, an empty context is better than a wrong
                # one, and the error says so.
                reason = log.take_errors() or f"it read {n} of {view.nbytes} bytes, or other positions than there are"
                memory.clear(handle, True)
                raise LoadError(
                    f"llama.cpp refused the state: {reason}; the context is empty now",
                    reason=reason,
                    removed=tuple(before),
                )
            return n

    def state_save_file(self, path: str | os.PathLike[str], tokens: TokensLike) -> int:
        """Write the whole context's state and ``tokens`` to a file, atomically and durably.

        Parameters
        ----------
        path : path-like
        tokens : array-like of int
            Stored beside the state, for whoever loads it. Need not have anything to do with it.

        Returns
        -------
        int
            Bytes written: the very ones that ``llama_state_save_file`` writes.

        Raises
        ------
        SaveError
            The old file, if any, is as it was.
        TokenizeError
            A token id out of range.
        PendingUpdateError
            As for :meth:`state_get_data_into`.

        Notes
        -----
        Holds the whole file in memory while it is written: llama.cpp's tensors may lie anywhere, and the context is
        free for others as soon as the copy is made.
        """
        ids = as_tokens(tokens, self.model.n_vocab)
        header = layout.header_bytes("context", ids)
        with self._handle as handle:
            self._refuse_pending("state_save_file")
            out = np.empty(len(header) + state.get_size(handle), np.uint8)
            out[: len(header)] = np.frombuffer(header, np.uint8)
            state.get_data_into(handle, out[len(header) :])
        return save(path, out)

    def state_load_file(self, path: str | os.PathLike[str], *, max_tokens: int | None = None) -> Int32Array:
        """Replace the whole context's state by a file's (``llama_state_load_file``).

        Parameters
        ----------
        path : path-like
            Written by :meth:`state_save_file`, by llama.cpp or by anything on top of it.
        max_tokens : int, optional
            Refuse a file with more tokens.

        Returns
        -------
        int32[n]
            The tokens stored beside the state. They are already decoded: do not feed them again.

        Raises
        ------
        LoadError
            One of its subclasses says why (:class:`StateFileNotFoundError`, :class:`InsufficientMaxTokensError`, ...);
            the context is as it was, with the exception of :meth:`state_set_data`.
        """
        with MappedFile(path) as file, naming(path):
            head = layout.read_header(file.view, kind="context", max_tokens=max_tokens)
            tokens = self._file_tokens(head)
            with file.view[head.state_offset :] as blob:
                self.state_set_data(blob)
            return tokens

    # --- one sequence -------------------------------------------------------------------------------------------------

    def state_seq_get_size(self, seq_id: int, flags: int = SeqFlags.NONE) -> int:
        """Bytes that one sequence's state takes now (``llama_state_seq_get_size_ext``). O(cells)."""
        n: int = state.seq_get_size(self._handle, seq_id, flags)
        return n

    def state_seq_get_data(self, seq_id: int, flags: int = SeqFlags.NONE) -> npt.NDArray[np.uint8]:
        """Copy one sequence's state into a new array (``llama_state_seq_get_data_ext``).

        Returns
        -------
        uint8[n]
        """
        with self._handle as handle:
            out = np.empty(state.seq_get_size(handle, seq_id, flags), np.uint8)
            self.state_seq_get_data_into(out, seq_id, flags)
            return out

    def state_seq_get_data_into(self, out: Any, seq_id: int, flags: int = SeqFlags.NONE) -> int:
        """Copy one sequence's state into ``out`` (``llama_state_seq_get_data_ext``).

        Parameters
        ----------
        out : buffer
            Writable, contiguous, of any type, of at least :meth:`state_seq_get_size` bytes.
        seq_id : int
            In ``[0, n_seq_max)``.
        flags : SeqFlags
            With ``ON_DEVICE`` the tensors stay in the context, and the blob before of this sequence is void.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        BufferTooSmallError, InvalidBufferError, InvalidSequenceError, InvalidFlagsError
            Nothing was written.
        PendingUpdateError
            Its positions were shifted and nothing has been decoded since. Other sequences are not concerned.
        UnsupportedLayoutError, OnDeviceStateError
            With ``ON_DEVICE``: llama.cpp would lose data (a cache of blocks such as q8_0), or might abort.

        Notes
        -----
        Moves every byte once; the GIL is free meanwhile.
        """
        with self._handle as handle:
            state.check(handle, seq_id, flags)
            if handle.shifted:
                self._refuse_pending("state_seq_get_data", seq_id)
            n: int
            if not flags & SeqFlags.ON_DEVICE:
                n = state.seq_get_data_into(handle, out, seq_id, flags)
                return n
            taken = device.check_take(self, seq_id, flags)
            n = state.seq_get_data_into(handle, out, seq_id, flags)
            with as_bytes_view(out) as view:
                device.note_taken(self, seq_id, flags, taken, view[:n])
            return n

    def state_seq_set_data(self, src: Any, dest_seq_id: int, flags: int = SeqFlags.NONE) -> int:
        """Replace one sequence's state (``llama_state_seq_set_data_ext``).

        Parameters
        ----------
        src : buffer
            What :meth:`state_seq_get_data` gave, here or in another context of the same model and cache settings. Not
            copied.
        dest_seq_id : int
            In ``[0, n_seq_max)``; need not be the one it came from.
        flags : SeqFlags
            Those it was taken with. A ``PARTIAL_ONLY`` state goes onto a sequence that still begins with the same
            tokens, as many as it was taken at; later ones are removed. That the tokens are the same is the caller's
            promise.

        Returns
        -------
        int
            Bytes read: all of them.

        Raises
        ------
        LoadError
            One of its subclasses says why; the sequence, and all others, are as they were. The one exception is a state
            that passes validation and that llama.cpp refuses all the same, to which no way is known: ``removed`` says
            that the sequence is empty then. All others are as they were even so.
        InvalidSequenceError, InvalidFlagsError, InvalidBufferError
            Likewise.

        Notes
        -----
        Moves every byte once; the checks read only what is not tensor data. The GIL is free while bytes move.

        A sequence that holds something, in a unified cache that could be too full for the new state, costs more: its
        free cells are counted in a copy of the whole context's state, for nothing else in llama.cpp's interface tells
        which cells are shared. That they suffice is seen without, as long as the tokens of all other sequences and
        the new one's fit the cache together and no positions have ever been moved.
        """
        with as_bytes_view(src) as view, self._handle as handle:
            state.check(handle, dest_seq_id, flags)
            on_device = bool(flags & SeqFlags.ON_DEVICE)
            if on_device:
                device.check_generation(self, view, int(flags))
            schema = self.schema
            partial = bool(flags & SeqFlags.PARTIAL_ONLY) and schema.has_partial
            info = layout.validate_sequence(view, schema, self.limits, partial=partial, on_device=on_device)
            if partial:
                restore.check_base(self, info, dest_seq_id)
            restore.replace_sequence(self, view, info, dest_seq_id, int(flags), partial=partial)
            return view.nbytes

    def state_seq_save_file(self, path: str | os.PathLike[str], seq_id: int, tokens: TokensLike) -> int:
        """Write one sequence's state and ``tokens`` to a file, atomically and durably.

        Parameters
        ----------
        path : path-like
        seq_id : int
            In ``[0, n_seq_max)``.
        tokens : array-like of int
            Stored beside the state: those that the sequence was decoded from, as a rule. Nobody checks that, for the
            format leaves it open (none are fine, and images have fewer positions than tokens); ``Snapshot.take`` and
            ``Session.export_file`` see to it.

        Returns
        -------
        int
            Bytes written: the very ones that ``llama_state_seq_save_file`` writes.

        Raises
        ------
        SaveError
            The old file, if any, is as it was.
        TokenizeError
            A token id out of range.
        PendingUpdateError
            As for :meth:`state_seq_get_data_into`.

        Notes
        -----
        Holds the whole file in memory while it is written; the context is free for others as soon as that copy is made.
        """
        ids = as_tokens(tokens, self.model.n_vocab)
        header = layout.header_bytes("sequence", ids)
        # A sequence's state in memory has eight bytes in front that its file does not have. Let them land in the room
        # of the file's own header, which is longer, and write that last: one buffer, no copy.
        start = len(header) - SEQ_HEADER
        with self._handle as handle:
            state.check(handle, seq_id, 0)
            self._refuse_pending("state_seq_save_file", seq_id)
            out = np.empty(start + state.seq_get_size(handle, seq_id, 0), np.uint8)
            state.seq_get_data_into(handle, out[start:], seq_id, 0)
        out[: len(header)] = np.frombuffer(header, np.uint8)
        return save(path, out)

    def state_seq_load_file(
        self, path: str | os.PathLike[str], dest_seq_id: int, *, max_tokens: int | None = None
    ) -> tuple[Int32Array, int]:
        """Replace one sequence's state by a file's (``llama_state_seq_load_file``).

        Parameters
        ----------
        path : path-like
            Written by :meth:`state_seq_save_file`, by llama.cpp or by anything on top of it.
        dest_seq_id : int
            In ``[0, n_seq_max)``.
        max_tokens : int, optional
            Refuse a file with more tokens.

        Returns
        -------
        tokens : int32[n]
            Stored beside the state. They are already decoded: do not feed them again.
        n_bytes : int
            Size of the file.

        Raises
        ------
        LoadError
            One of its subclasses says why; the sequence, and all others, are as they were, with the exception of
            :meth:`state_seq_set_data`.

        Notes
        -----
        The file is mapped, not read: bytes go from the page cache to llama.cpp. Whoever cuts a file short in place
        while it is being loaded kills the process, as with any mapped file; replace files instead of rewriting them.
        """
        with MappedFile(path) as file, naming(path):
            head = layout.read_header(file.view, kind="sequence", max_tokens=max_tokens)
            tokens = self._file_tokens(head)
            # llama.cpp takes the in-memory form only: put its header into our private copy of the page, over the end
            # of the file's header, which has been read.
            start = head.state_offset - SEQ_HEADER
            file.view[start : head.state_offset] = _SEQ_HEADER.pack(layout.SEQUENCE_MAGIC, 0)
            with file.view[start:] as blob, blob[SEQ_HEADER:] as body, self._handle as handle:
                state.check(handle, dest_seq_id, SeqFlags.NONE)
                info = layout.validate_sequence(body, self.schema, self.limits, header=False)
                restore.replace_sequence(self, blob, info, dest_seq_id, SeqFlags.NONE, partial=False)
            return tokens, file.view.nbytes

    # --- restoring, step by step --------------------------------------------------------------------------------------

    def _span(self, seq_id: int) -> tuple[int, int]:
        return memory.seq_pos_min(self._handle, seq_id), memory.seq_pos_max(self._handle, seq_id)

    def _refuse_pending(self, operation: str, seq_id: SupportsIndex | None = None) -> None:
        # The cells already say the new positions, but the K rows are rotated for the old ones: a state taken now would
        # be wrong, and nothing in it would say so.
        if not self._handle.shifted:
            return
        pending = sorted(self._handle.shifted if seq_id is None else self._handle.shifted & {index(seq_id)})
        if pending:
            raise PendingUpdateError(
                f"{operation}: positions of sequence {', '.join(map(str, pending))} were shifted; llama.cpp turns the "
                "keys at the next decode",
                operation=operation,
                seq_ids=tuple(pending),
            )

    # --- files --------------------------------------------------------------------------------------------------------

    def _file_tokens(self, head: layout.FileHeader) -> Int32Array:
        tokens: Int32Array = head.tokens.copy()
        outside = (tokens < 0) | (tokens >= self.model.n_vocab)
        if outside.any():
            index = int(np.argmax(outside))
            raise CorruptStateError(
                f"token {index} is {int(tokens[index])}, not in [0, {self.model.n_vocab})"
                + ("; if llama-server packed them, Session.import_file reads them" if head.packed else ""),
                reason="token id out of range",
                offset=12 + 4 * index,
                section="tokens",
            )
        return tokens
