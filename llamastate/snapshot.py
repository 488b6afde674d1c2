"""Snapshots: the state of one sequence with everything that makes it usable elsewhere.

A snapshot is one buffer, and that buffer is the image of its file (docs/llsnap.md): the state moves once, from
llama.cpp into its section; saving writes the buffer as it is; opening maps the file; pickling hands the buffer over.
Checksums are filled in when the bytes are about to leave (:meth:`Snapshot.seal`), and each section is verified when it
is first used.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from llamastate import layout, restore, snapfile, snapimage
from llamastate._native import decode, memory, state
from llamastate._native.exporter import Span
from llamastate.arrays import TokensLike, as_index, as_tokens
from llamastate.errors import (
    BufferTooSmallError,
    CorruptStateError,
    InvalidArgumentError,
    InvalidBufferError,
    LlamaStateError,
    TokensMismatchError,
    UnsupportedLayoutError,
)
from llamastate.fingerprint import require_same
from llamastate.flags import SeqFlags
from llamastate.layout import KVSchema
from llamastate.sampler import Sampler
from llamastate.snapfile import Form, Kind, Section, section_key
from llamastate.snapimage import SnapshotImage, corrupt, verify_section
from llamastate.snapparts import (
    CheckpointFlags,
    CheckpointRecord,
    checkpoint_sections,
    json_section,
    logits_section,
    sampler_section,
)
from llamastate.state import SEQ_HEADER, StateAPI
from llamastate.statefiles import naming

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate._native.handles import ContextHandle
    from llamastate.context import Context
    from llamastate.layout import Schema, SequenceInfo

__all__ = ["CheckpointFlags", "CheckpointRecord", "Snapshot"]


class Snapshot(SnapshotImage):
    """The state of one sequence, self-describing, verified, portable.

    Made by :meth:`take`, :meth:`open`, :meth:`from_buffer` or unpickling. It is a read-only buffer itself
    (``memoryview(snapshot)``): the image of its file, checksums included.

    Examples
    --------
    >>> snapshot = Snapshot.take(ctx, 0, tokens, logits="last")  # doctest: +SKIP
    >>> snapshot.save("chat.llsnap")  # doctest: +SKIP
    >>> Snapshot.open("chat.llsnap").restore(other_ctx, 3)  # doctest: +SKIP
    2048
    """

    # --- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def take(
        cls,
        ctx: Context,
        seq_id: int,
        tokens: TokensLike,
        *,
        out: Any = None,
        logits: npt.ArrayLike | str | None = None,
        sampler: Sampler | Mapping[str, Any] | None = None,
        checkpoints: Iterable[CheckpointRecord] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Take the state of a sequence (``llama_state_seq_get_data_ext``).

        Parameters
        ----------
        ctx : Context
        seq_id : int
            In ``[0, n_seq_max)``.
        tokens : array-like of int
            All tokens that the sequence was decoded from.
        out : buffer or Snapshot, optional
            Where to put it: a writable buffer that is large enough, or a snapshot that is given up for its memory
            (which is used again if it is large enough). Touched memory is several times as fast as new memory.
        logits : float32[n_vocab], "last" or None
            What followed the last token: no state tells it, and without it the next token can only be sampled after
            another decode. "last" takes it from the last decode.
        sampler : Sampler or mapping, optional
            A mapping is kept as it is (JSON types), of a sampler its :attr:`Sampler.state`.
        checkpoints : iterable of CheckpointRecord
            Copied.
        metadata : mapping, optional
            Anything of JSON types.

        Returns
        -------
        Snapshot

        Raises
        ------
        TokensMismatchError
            The sequence does not hold just these tokens.
        LogitsUnavailableError
            "last", and the last decode has no logits for the last token of this sequence.
        BufferTooSmallError
            ``out`` is; ``needed`` says how many bytes it takes.
        InvalidBufferError
            ``out`` is read-only, not contiguous, or a snapshot of which arrays are still in use.
        PendingUpdateError, InvalidSequenceError, TokenizeError, FingerprintUnavailableError
            As their names say.

        Notes
        -----
        Moves every byte of the state once, with the GIL released; no checksum is computed before :meth:`seal`.
        """
        _check_context(ctx)
        ids = as_tokens(tokens, ctx.model.n_vocab)
        items: list[tuple[int, int, Any]] = [(Kind.FINGERPRINT, 0, b""), (Kind.TOKENS, 0, ids)]
        row = None if logits is None else logits_section(logits, ctx.model.n_vocab)
        if logits is not None:
            items.append((Kind.LOGITS, 0, np.empty(ctx.model.n_vocab, np.float32) if row is None else row))
        if sampler is not None:
            items.append((Kind.SAMPLER, 0, sampler_section(sampler)))
        if metadata is not None:
            items.append((Kind.METADATA, 0, json_section("metadata", metadata)))
        if records := list(checkpoints):
            items += checkpoint_sections(records)
        with ctx._handle as handle:
            state.check(handle, seq_id, 0)
            seq = index(seq_id)
            if handle.shifted:
                ctx._refuse_pending("Snapshot.take", seq)
            schema = ctx.schema
            _check_step(len(ids), memory.seq_pos_min(handle, seq), memory.seq_pos_max(handle, seq), schema)
            if logits is not None and row is None:
                decode.logits_into(handle, handle.last_output(seq), items[2][2])
            fingerprint = ctx.fingerprint
            items[0] = (Kind.FINGERPRINT, 0, fingerprint.json)
            sizes = [(kind, detail, memoryview(data).nbytes) for kind, detail, data in items]
            span, form = _room(handle, seq, sizes, _at_most(schema, len(ids)), out)
            # The state comes last, in the file and here: after a copy of many megabytes all else is slow for a while.
            _write(span, form, items)
            last = form.sections[-1]
            n = state.seq_get_data_into(handle, span, seq, 0, last.length, last.offset)
            if n != last.length:
                form = snapfile.form((*sizes, (Kind.STATE, 0, n)))
                span.resize(form.total)
                span.write(0, form.front, len(form.front))
        self = cls._new(span, form.by_key, sealed=False, verify=False)
        self._found_fingerprint = fingerprint
        return self

    # --- restoring ----------------------------------------------------------------------------------------------------

    def restore(self, ctx: Context, dest_seq_id: int) -> int:
        """Make a sequence hold this state, in place of what it holds (``llama_state_seq_set_data_ext``).

        Parameters
        ----------
        ctx : Context
            Of the same model, with the same adapters and cache settings.
        dest_seq_id : int
            In ``[0, n_seq_max)``; need not be the one it was taken from.

        Returns
        -------
        int
            How many tokens the sequence holds now. The next token goes to that position; none of :attr:`tokens` is to
            be decoded again.

        Raises
        ------
        FingerprintMismatchError
            Another model, other adapters or settings; ``field`` says which.
        CorruptStateError
            ``section`` says where.
        NotEnoughCellsError, LoadError
            It does not fit, or llama.cpp refused it.
        InvalidSequenceError, FingerprintUnavailableError

        Notes
        -----
        After an error the sequence, and all others, are as they were. Moves every byte once, and reads every byte once
        more the first time, to verify it.
        """
        _check_context(ctx)
        with naming(self.path), ctx._handle as handle:
            state.check(handle, dest_seq_id, 0)
            dest = as_index(dest_seq_id, "dest_seq_id", InvalidArgumentError)
            require_same(self.fingerprint, ctx.fingerprint)
            n = self._check_tokens(ctx.model.n_vocab)
            section = self._sections[Kind.STATE, 0]
            if section.detail != SeqFlags.NONE:
                raise UnsupportedLayoutError(
                    f"a snapshot of a partial state (flags {section.detail})", kind="partial", reason="flags"
                )
            with memoryview(self._image())[section.offset : section.offset + section.length] as blob:
                self._set(ctx, blob, section, dest, n)
        return n

    def _check_tokens(self, n_vocab: int) -> int:
        tokens = self.tokens
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= n_vocab):
            section = self._sections[Kind.TOKENS, 0]
            index = int(np.argmax((tokens < 0) | (tokens >= n_vocab)))
            raise corrupt(section, 4 * index, f"token {index} is {int(tokens[index])}, not in [0, {n_vocab})")
        return len(tokens)

    def _set(self, ctx: Context, blob: memoryview, section: Section, dest: int, n: int) -> None:
        key = section_key(section)
        # Hashing reads the bytes once and restoring once more; side by side both take as long as one. What turns out
        # to be damaged is removed again before anybody else sees it, which takes an empty sequence to come back to.
        overlap = key in self._unverified and blob.nbytes >= snapimage.OVERLAP and ctx._span(dest) == (-1, -1)
        if not overlap:
            if key in self._unverified:
                verify_section(blob, section)
                self._unverified.discard(key)
            self._replace(ctx, blob, section, dest, n)
            return
        with ThreadPoolExecutor(1, "llamastate-verify") as pool:
            verified = pool.submit(verify_section, blob, section)
            try:
                self._replace(ctx, blob, section, dest, n)
            except LlamaStateError:
                verified.result()  # damage is the better explanation of whatever else is wrong
                raise
            try:
                verified.result()
            except BaseException:
                memory.seq_rm(ctx._handle, dest, -1, -1)
                raise
        self._unverified.discard(key)

    def _replace(self, ctx: Context, blob: memoryview, section: Section, dest: int, n: int) -> None:
        try:
            info = layout.validate_sequence(blob, ctx.schema, ctx.limits)
        except CorruptStateError as error:
            raise CorruptStateError(
                f"damaged snapshot: {error}",
                reason=error.reason,
                offset=section.offset + (error.offset or 0),
                section="state",
            ) from error
        _check_info(info, n, ctx.schema, section)
        restore.replace_sequence(ctx, blob, info, dest, 0, partial=False)

    # --- pickling -----------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        if int(protocol) >= 5:
            return _unpickle, (type(self), pickle.PickleBuffer(self))
        return _unpickle, (type(self), bytes(memoryview(self)))


def _unpickle(cls: type[Snapshot], data: Any) -> Snapshot:
    return cls.from_buffer(data)


def _check_context(ctx: object) -> None:
    if not isinstance(ctx, StateAPI):
        raise InvalidArgumentError(f"ctx is {type(ctx).__name__}, not a Context", name="ctx", value=ctx)


# --- taking ---------------------------------------------------------------------------------------------------------


def _room(
    handle: ContextHandle, seq: int, sizes: list[tuple[int, int, int]], at_most: int, out: Any
) -> tuple[Span, Form]:
    """Memory for a snapshot, which is ``out``'s if that will do, and how it is going to lie there.

    Parameters
    ----------
    handle : ContextHandle
    seq : int
    sizes : list of (kind, detail, length)
        The sections in front of the state.
    at_most : int
        Bytes that the state does not exceed. How many it is costs a walk over all cells, and is asked only where there
        is no room for so many.
    out : buffer, Snapshot or None
    """

    def exactly() -> Form:
        return snapfile.form((*sizes, (Kind.STATE, 0, state.seq_get_size(handle, seq, 0))))

    if out is None:
        form = exactly()
        return Span(np.empty(form.total, np.uint8), form.total, True), form
    form = snapfile.form((*sizes, (Kind.STATE, 0, at_most)))
    if isinstance(out, Snapshot):
        held = out._image()
        if held.views:
            raise InvalidBufferError(
                f"the snapshot given as out has {held.views} views in use", reason="in use", type="Snapshot"
            )
        room, source = held.capacity if held.writable else 0, held.source
        if room < form.total:
            form = exactly()
        out.close()
        if room < form.total:
            # a conversation grows: leave room, so that the next snapshot finds memory that has been touched
            source = np.empty(form.total + form.total // 8, np.uint8)
        return Span(source, form.total, True), form
    span = Span(out, 0, True)
    if span.capacity < form.total:
        form = exactly()
    try:
        span.resize(form.total)
    except BufferTooSmallError as error:
        needed, got = error.needed, error.got
        raise BufferTooSmallError(
            f"the snapshot takes {needed} bytes, the buffer has {got}", needed=needed, got=got
        ) from None
    return span, form


def _write(span: Span, form: Form, items: list[tuple[int, int, Any]]) -> None:
    """Write all but the state."""
    span.write(0, form.front, len(form.front))
    for (_, _, data), (section, following) in zip(items, pairwise(form.sections), strict=True):
        span.write(section.offset, data, following.offset)


def _at_most(schema: Schema, n: int) -> int:
    """Bytes that a state of ``n`` tokens does not exceed."""
    return SEQ_HEADER + sum(p.sequence_bytes(n if isinstance(p, KVSchema) else 1) for p in schema.parts)


def _check_step(n: int, low: int, high: int, schema: Schema) -> None:
    """Tokens and positions must tell the same story, as far as positions tell one."""
    wanted = -1 if not n else 0 if schema.kind == "attention" else None
    reach = schema.window_start(n) if n and schema.kind == "iswa" else n
    if high != n - 1 or (wanted is not None and low != wanted) or low > reach:
        raise TokensMismatchError(
            f"{n} tokens were given; the sequence " + ("is empty" if high < 0 else f"holds positions {low} to {high}"),
            n_tokens=n,
            pos_min=low,
            pos_max=high,
        )


def _check_info(info: SequenceInfo, n: int, schema: Schema, section: Section) -> None:
    """The same for a state that is to be restored."""
    wrong = info.pos_max != n - 1
    if schema.kind != "recurrent" and n:
        wrong = wrong or info.first_pos != 0 or info.n_cells != n
    if wrong:
        raise corrupt(
            section,
            0,
            f"the state is of {info.n_cells} cells at positions {info.first_pos} to {info.pos_max}, the tokens are {n}",
        )
