"""The image of a snapshot: its sections in one buffer, wherever they came from. No context is needed for it.

The image is read where it lies, each section verified when it is first used. Checksums are filled in when the bytes are
about to leave (:meth:`SnapshotImage.seal`).
"""

from __future__ import annotations

import json
import mmap as mmap_module
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llamastate import snapfile
from llamastate._native.exporter import Exporter, Span
from llamastate.arrays import Int32Array, as_bytes_view
from llamastate.errors import ClosedError, CorruptStateError, FileAccessError
from llamastate.fingerprint import Fingerprint
from llamastate.flags import SeqFlags
from llamastate.lifetimes import Closing
from llamastate.snapfile import Kind, Section, section_key
from llamastate.snapparts import CheckpointRecord, is_row
from llamastate.statefiles import naming, reading, save

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OVERLAP", "SnapshotImage", "corrupt", "verify_section"]

#: Above this many bytes a state is hashed in a second thread while it is copied or written.
OVERLAP = 4 << 20


class SnapshotImage(Exporter, Closing):
    """What can be done with a :class:`~llamastate.Snapshot` without a context. Not made directly."""

    #: The file that it was opened from.
    path: str | None
    _span: Span | None
    #: Never changed, only replaced: snapshots of the same sizes share one.
    _sections: Mapping[tuple[int, int], Section]
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
        self._sections = sections
        self._sealed = sealed
        self._unverified = set(sections) if verify else set()
        self._lock = threading.Lock()
        self._found_fingerprint = None
        return self

    # --- opening ------------------------------------------------------------------------------------------------------

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
                verify_section(view, section)
            self._unverified.discard(key)
        return view

    def _array(self, kind: int, detail: int, dtype: str) -> Any:
        section = self._sections[kind, detail]
        if section.length % np.dtype(dtype).itemsize:
            with naming(self.path):
                raise corrupt(section, 0, f"{section.length} bytes")
        return np.frombuffer(self._section((kind, detail)), dtype)

    def _parsed(self, kind: int) -> Any:
        section = self._sections.get((kind, 0))
        if section is None:
            return None
        try:
            found = json.loads(bytes(self._section((kind, 0))))
        except (ValueError, RecursionError) as error:
            raise self._named(corrupt(section, 0, f"no JSON: {error}")) from None
        if type(found) is not (list if kind == Kind.CHECKPOINTS else dict):
            raise self._named(corrupt(section, 0, f"JSON of type {type(found).__name__}"))
        return found

    def _named(self, error: CorruptStateError) -> CorruptStateError:
        error.path = self.path
        return error

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
            self._sections = {section_key(s): s for s in sections}
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
        if self._sealed or image.nbytes < OVERLAP:
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


class _Checkpoints(Sequence[CheckpointRecord]):
    """The checkpoints of a snapshot, read when they are asked for."""

    def __init__(self, snapshot: SnapshotImage) -> None:
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
            raise snapshot._named(corrupt(snapshot._sections[Kind.CHECKPOINTS, 0], 0, f"checkpoint {i}: {row!r:.80}"))
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


def verify_section(view: memoryview, section: Section) -> None:
    """Compare bytes with their checksum, or raise :class:`CorruptStateError`."""
    if snapfile.checksum(view) != section.checksum:
        raise corrupt(section, 0, "the checksum is wrong")


def corrupt(section: Section, at: int, reason: str) -> CorruptStateError:
    """What to raise about a section that is wrong, ``at`` bytes into it."""
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
