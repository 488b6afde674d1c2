"""Snapshots: the state of one sequence with everything that makes it usable elsewhere.

A snapshot is one buffer, and that buffer is the image of its file (docs/llsnap.md): the state moves once, from
llama.cpp into its section; saving writes the buffer as it is; opening maps the file; pickling hands the buffer over.
Checksums are filled in when the bytes are about to leave (:meth:`Snapshot.seal`), and each section is verified when it
is first used.
"""

from __future__ import annotations

import json
import mmap as mmap_module
import os
import pickle
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from llamastate import layout, restore, snapfile
from llamastate._native import decode, memory, state
from llamastate._native.exporter import Exporter, Span
from llamastate.arrays import Int32Array, TokensLike, as_bytes_view, as_index, as_tokens
from llamastate.errors import (
    BufferTooSmallError,
    ClosedError,
    CorruptStateError,
    FileAccessError,
    InvalidArgumentError,
    InvalidBufferError,
    LlamaStateError,
    TokensMismatchError,
    UnsupportedLayoutError,
)
from llamastate.fingerprint import Fingerprint, require_same
from llamastate.flags import SeqFlags
from llamastate.layout import KVSchema
from llamastate.lifetimes import Closing
from llamastate.sampler import Sampler
from llamastate.snapfile import Kind, Section
from llamastate.snapparts import (
    CheckpointFlags,
    CheckpointRecord,
    checkpoint_sections,
    is_row,
    json_section,
    logits_section,
    sampler_section,
)
from llamastate.state import SEQ_HEADER, StateAPI
from llamastate.statefiles import naming, reading, save

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.context import Context
    from llamastate.layout import Schema, SequenceInfo

__all__ = ["CheckpointFlags", "CheckpointRecord", "Snapshot"]

#: Above this many bytes a state is hashed in a second thread while llama.cpp copies it.
_OVERLAP = 4 << 20


class Snapshot(Exporter, Closing):
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

    #: The file that it was opened from.
    path: str | None
    _span: Span | None
    _sections: dict[tuple[int, int], Section]
    _sealed: bool
    _unverified: set[tuple[int, int]]
    _lock: threading.Lock
    _found_fingerprint: Fingerprint | None

    def __init__(self) -> None:
        raise TypeError("use Snapshot.take(), Snapshot.open() or Snapshot.from_buffer()")

    @classmethod
    def _new(cls, span: Span, sections: Mapping[tuple[int, int], Section], *, sealed: bool, verify: bool) -> Self:
        self = cls.__new__(cls)
        self.path = None
        self._span = span
        self._sections = dict(sections)
        self._sealed = sealed
        self._unverified = set(self._sections) if verify else set()
        self._lock = threading.Lock()
        self._found_fingerprint = None
        return self

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
        items: list[tuple[int, int, Any]] = [(Kind.FINGERPRINT, 0, None), (Kind.TOKENS, 0, ids)]
        row = None if logits is None else logits_section(logits, ctx.model.n_vocab)
        if logits is not None:
            items.append((Kind.LOGITS, 0, np.empty(ctx.model.n_vocab, np.float32) if row is None else row))
        if sampler is not None:
            items.append((Kind.SAMPLER, 0, sampler_section(sampler)))
        if metadata is not None:
            items.append((Kind.METADATA, 0, json_section("metadata", metadata)))
        items += checkpoint_sections(list(checkpoints))
        with ctx._handle as handle:
            state.check(handle, seq_id, 0)
            seq = as_index(seq_id, "seq_id", InvalidArgumentError)
            ctx._refuse_pending("Snapshot.take", seq)
            _check_step(len(ids), *ctx._span(seq), ctx.schema)
            if logits is not None and row is None:
                decode.logits_into(handle, handle.last_output(seq), items[2][2])
            fingerprint = ctx.fingerprint
            items[0] = (Kind.FINGERPRINT, 0, fingerprint.json)
            places = [(kind, detail, memoryview(data).nbytes) for kind, detail, data in items]
            # the state comes last: so it has a place before its size is known
            *sections, last = snapfile.lay_out([*places, (Kind.STATE, 0, 0)])
            buffer, n = _fill(ctx, seq, len(ids), last.offset, out)
        sections.append(Section(last.kind, last.flags, last.offset, n, last.detail))
        span = Span(buffer, last.offset + n, True)
        with memoryview(span) as image:
            snapfile.write_table(image, sections)
            for (_, _, data), section in zip(items, sections, strict=False):
                if section.length:
                    image[section.offset : section.offset + section.length] = memoryview(data).cast("B")
        self = cls._new(span, {_key(s): s for s in sections}, sealed=False, verify=False)
        self._found_fingerprint = fingerprint
        return self

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, mmap: bool = True, verify: bool = True) -> Self:
        """Open a file that :meth:`save` has written.

        Parameters
        ----------
        path : path-like
        mmap : bool
            Map the file (nothing is copied, and several processes share the memory), or read it.
        verify : bool
            Compare each section with its checksum before it is first used. Header and table always are, and a state is
            checked for everything but the contents of tensors whenever it is restored.

        Raises
        ------
        StateFileNotFoundError, FileAccessError
            It cannot be read.
        BadMagicError, VersionMismatchError, CorruptStateError
            It is no snapshot, a newer one, or damaged.

        Notes
        -----
        Replacing the file does no harm to a snapshot that is open. Cutting it short in place kills the process that
        uses it, as with any mapped file.
        """
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            data: Any = b""
            if size and mmap:
                data = mmap_module.mmap(file.fileno(), size, access=mmap_module.ACCESS_READ)
            elif size:
                data = np.empty(size, np.uint8)
                _read_into(file, memoryview(data))
        with naming(path):
            self = cls._of(data, exact=True, verify=verify)
        self.path = os.fsdecode(path)
        return self

    @classmethod
    def from_buffer(cls, obj: Any, *, verify: bool = True) -> Self:
        """Use the image of a snapshot where it lies: bytes, shared memory, a Ray object.

        Parameters
        ----------
        obj : buffer
            Held until the snapshot is closed. Bytes after the image are ignored: shared memory comes in pages.
        verify : bool
            As for :meth:`open`.

        Raises
        ------
        InvalidBufferError, BadMagicError, VersionMismatchError, CorruptStateError
        """
        return cls._of(obj, exact=False, verify=verify)

    @classmethod
    def _of(cls, obj: Any, *, exact: bool, verify: bool) -> Self:
        with as_bytes_view(obj) as view:
            directory = snapfile.read(view, exact=exact)
        span = Span(obj, directory.total, False)
        return cls._new(span, directory.sections, sealed=directory.sealed, verify=verify)

    # --- life ---------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the buffer has been given back."""
        return self._span is None

    def close(self) -> None:
        """Give the buffer back. Arrays that came from it keep it as long as they live. Idempotent."""
        span, self._span = self._span, None
        if span is not None and not span.views:
            span.release()

    def __repr__(self) -> str:
        if self._span is None:
            return "<llamastate.Snapshot closed>"
        origin = f", {self.path!r}" if self.path else ""
        return f"<llamastate.Snapshot {self.n_tokens} tokens, {self.nbytes} bytes{origin}>"

    def _image(self) -> Span:
        span = self._span
        if span is None:
            raise ClosedError("the snapshot is closed", what="snapshot")
        return span

    # --- what is inside -----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the whole image."""
        return self._image().nbytes

    @property
    def n_tokens(self) -> int:
        """How many tokens the sequence held."""
        return self._sections[Kind.TOKENS, 0].length // 4

    @property
    def seq_flags(self) -> SeqFlags:
        """With what flags the state was taken."""
        return SeqFlags(self._sections[Kind.STATE, 0].detail)

    @property
    def tokens(self) -> Int32Array:
        """The tokens, int32[n_tokens]; read-only, not copied."""
        array: Int32Array = self._array(Kind.TOKENS, 0, "<i4")
        return array

    @property
    def state(self) -> npt.NDArray[np.uint8]:
        """The state blob, as ``Context.state_seq_get_data`` gives it, uint8[n]; read-only, not copied."""
        array: npt.NDArray[np.uint8] = self._array(Kind.STATE, 0, "u1")
        return array

    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """The logits of the last token, float32[n_vocab], or None; read-only, not copied."""
        if (Kind.LOGITS, 0) not in self._sections:
            return None
        array: npt.NDArray[np.float32] = self._array(Kind.LOGITS, 0, "<f4")
        return array

    @property
    def fingerprint(self) -> Fingerprint:
        """What the state depends on."""
        if self._found_fingerprint is None:
            with naming(self.path):
                self._found_fingerprint = Fingerprint.from_dict(self._parsed(Kind.FINGERPRINT))
        return self._found_fingerprint

    @property
    def sampler_state(self) -> dict[str, Any] | None:
        """What was given as ``sampler``, or None."""
        found: dict[str, Any] | None = self._parsed(Kind.SAMPLER)
        return found

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given as ``metadata``; empty if nothing was."""
        found: dict[str, Any] | None = self._parsed(Kind.METADATA)
        return {} if found is None else found

    @property
    def checkpoints(self) -> Sequence[CheckpointRecord]:
        """The checkpoints, in the order in which they were given. Each is verified when it is looked at."""
        return _Checkpoints(self)

    def _section(self, key: tuple[int, int]) -> memoryview:
        """The bytes of a section, verified."""
        section = self._sections[key]
        view = memoryview(self._image()).toreadonly()[section.offset : section.offset + section.length]
        if key in self._unverified:
            with naming(self.path):
                _verify(view, section)
            self._unverified.discard(key)
        return view

    def _array(self, kind: int, detail: int, dtype: str) -> Any:
        section = self._sections[kind, detail]
        if section.length % np.dtype(dtype).itemsize:
            with naming(self.path):
                raise _corrupt(section, 0, f"{section.length} bytes")
        return np.frombuffer(self._section((kind, detail)), dtype)

    def _parsed(self, kind: int) -> Any:
        section = self._sections.get((kind, 0))
        if section is None:
            return None
        try:
            found = json.loads(bytes(self._section((kind, 0))))
        except (ValueError, RecursionError) as error:
            raise self._named(_corrupt(section, 0, f"no JSON: {error}")) from None
        if type(found) is not (list if kind == Kind.CHECKPOINTS else dict):
            raise self._named(_corrupt(section, 0, f"JSON of type {type(found).__name__}"))
        return found

    def _named(self, error: CorruptStateError) -> CorruptStateError:
        error.path = self.path
        return error

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
            raise _corrupt(section, 4 * index, f"token {index} is {int(tokens[index])}, not in [0, {n_vocab})")
        return len(tokens)

    def _set(self, ctx: Context, blob: memoryview, section: Section, dest: int, n: int) -> None:
        key = _key(section)
        # Hashing reads the bytes once and restoring once more; side by side both take as long as one. What turns out
        # to be damaged is removed again before anybody else sees it, which takes an empty sequence to come back to.
        overlap = key in self._unverified and blob.nbytes >= _OVERLAP and ctx._span(dest) == (-1, -1)
        if not overlap:
            if key in self._unverified:
                _verify(blob, section)
                self._unverified.discard(key)
            self._replace(ctx, blob, section, dest, n)
            return
        with ThreadPoolExecutor(1, "llamastate-verify") as pool:
            verified = pool.submit(_verify, blob, section)
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

    # --- leaving ------------------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Fill the checksums in. Saving, pickling and exporting do so themselves. Idempotent.

        Notes
        -----
        Reads every byte once (XXH3-128, about the speed of memory).
        """
        with self._lock:
            if self._sealed:
                return
            with memoryview(self._image()) as image:
                sections = snapfile.seal(image, sorted(self._sections.values(), key=lambda s: s.offset))
            self._sections = {_key(s): s for s in sections}
            self._sealed = True

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write it to a file, atomically and durably.

        Parameters
        ----------
        path : path-like
            By custom it ends in ``.llsnap``.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        SaveError
            The old file, if any, is as it was.
        """
        image = np.frombuffer(self._image(), np.uint8)  # type: ignore[call-overload]
        if self._sealed or image.nbytes < _OVERLAP:
            self.seal()
            return save(path, image)
        # The checksums stand in the front of the file: they are computed while what comes after them is being written.
        start = min(s.offset for s in self._sections.values())
        with ThreadPoolExecutor(1, "llamastate-seal") as pool:
            try:
                sealing = pool.submit(self.seal)
            except RuntimeError:  # at the interpreter's end there are no more threads
                self.seal()
                return save(path, image)

            def head() -> bytes:
                sealing.result()
                return bytes(image[:start])

            return save(path, image[start:], head=(start, head))

    def _exported(self) -> Span:
        self.seal()
        return self._image()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        if int(protocol) >= 5:
            return _unpickle, (type(self), pickle.PickleBuffer(self))
        return _unpickle, (type(self), bytes(memoryview(self)))


def _unpickle(cls: type[Snapshot], data: Any) -> Snapshot:
    return cls.from_buffer(data)


class _Checkpoints(Sequence[CheckpointRecord]):
    """The checkpoints of a snapshot, read when they are asked for."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._rows: list[Any] = snapshot._parsed(Kind.CHECKPOINTS) or []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[CheckpointRecord]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        snapshot, row = self._snapshot, self._rows[i]
        if not is_row(row):
            raise snapshot._named(_corrupt(snapshot._sections[Kind.CHECKPOINTS, 0], 0, f"checkpoint {i}: {row!r:.80}"))
        sections = snapshot._sections
        has_state, has_logits = (Kind.CHECKPOINT_STATE, i) in sections, (Kind.CHECKPOINT_LOGITS, i) in sections
        return CheckpointRecord(
            row["n_tokens"],
            row["label"],
            row["created"],
            row["flags"],
            snapshot._array(Kind.CHECKPOINT_STATE, i, "u1") if has_state else None,
            snapshot._array(Kind.CHECKPOINT_LOGITS, i, "<f4") if has_logits else None,
        )


def _check_context(ctx: object) -> None:
    if not isinstance(ctx, StateAPI):
        raise InvalidArgumentError(f"ctx is {type(ctx).__name__}, not a Context", name="ctx", value=ctx)


# --- taking ---------------------------------------------------------------------------------------------------------


def _fill(ctx: Context, seq: int, n: int, start: int, out: Any) -> tuple[Any, int]:
    """Get the state into ``out`` from ``start`` on, or into new memory; the buffer, and bytes of the state."""
    handle = ctx._handle
    old = out if isinstance(out, Snapshot) else None
    if old is not None:
        span = old._image()
        if span.views:
            raise InvalidBufferError(
                f"the snapshot given as out has {span.views} views in use", reason="in use", type="Snapshot"
            )
        fits = span.writable and span.capacity >= start + state.seq_get_size(handle, seq, 0)
        source = span.source if fits else None
        old.close()
        out = source
    if out is None:
        size = start + state.seq_get_size(handle, seq, 0)
        # a conversation grows: leave room, so that the next snapshot finds its memory touched (untouched costs none)
        out = np.empty(size if old is None else size + size // 8, np.uint8)
    with as_bytes_view(out) as view, view[start:] as place:
        try:
            if view.nbytes >= start:
                return out, state.seq_get_data_into(handle, place, seq, 0, _at_most(ctx.schema, n))
        except BufferTooSmallError:
            pass
        needed = start + state.seq_get_size(handle, seq, 0)
        raise BufferTooSmallError(
            f"the snapshot takes {needed} bytes, the buffer has {view.nbytes}", needed=needed, got=view.nbytes
        )


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
        raise _corrupt(
            section,
            0,
            f"the state is of {info.n_cells} cells at positions {info.first_pos} to {info.pos_max}, the tokens are {n}",
        )


# --- reading --------------------------------------------------------------------------------------------------------


def _key(section: Section) -> tuple[int, int]:
    numbered = section.kind in (Kind.CHECKPOINT_STATE, Kind.CHECKPOINT_LOGITS)
    return section.kind, section.detail if numbered else 0


def _verify(view: memoryview, section: Section) -> None:
    if snapfile.checksum(view) != section.checksum:
        raise _corrupt(section, 0, "the checksum is wrong")


def _corrupt(section: Section, at: int, reason: str) -> CorruptStateError:
    name = snapfile.section_name(section)
    return CorruptStateError(
        f"damaged snapshot: {name}: {reason}", reason=reason, offset=section.offset + at, section=name
    )


def _read_into(file: Any, view: memoryview) -> None:
    at = 0
    while at < view.nbytes:
        n = file.readinto(view[at:])
        if not n:
            raise FileAccessError(f"it ends after {at} of {view.nbytes} bytes", reason="cut short while being read")
        at += n
