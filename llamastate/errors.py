"""The exception tree.

Every error raised on purpose by this package derives from :class:`LlamaStateError` and carries the facts that
led to it as attributes: a caller should never have to parse a message. Where Python has a builtin that people
already catch for the same reason (``ValueError``, ``OSError``, ``MemoryError``, ``RuntimeError``, ``IndexError``)
the class derives from that too.

The facts are given as keyword arguments to the constructor; each becomes an attribute. Positional arguments after
the message are not accepted, so two facts can never be swapped silently.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AdapterLoadError",
    "BadMagicError",
    "BatchChangedError",
    "BufferTooSmallError",
    "ClosedError",
    "ContextBusyError",
    "ContextCreateError",
    "CorruptStateError",
    "DecodeAbortedError",
    "DecodeError",
    "EntryNotFoundError",
    "FileAccessError",
    "FingerprintMismatchError",
    "FingerprintUnavailableError",
    "HeadMovedError",
    "HistoryError",
    "InsufficientMaxTokensError",
    "InvalidArgumentError",
    "InvalidBatchError",
    "InvalidBufferError",
    "InvalidFlagsError",
    "InvalidPositionError",
    "InvalidRequestError",
    "InvalidSequenceError",
    "LayoutMismatchError",
    "LlamaStateError",
    "LoadError",
    "LogTamperedError",
    "LogitsUnavailableError",
    "MediaTokensError",
    "ModelLoadError",
    "NativeVersionError",
    "NoKVSlotError",
    "NotCopyableError",
    "NotEnoughCellsError",
    "OnDeviceStateError",
    "OutputMovedError",
    "PendingUpdateError",
    "SamplerError",
    "SaveError",
    "SequenceChangedError",
    "SequencesNotEmptyError",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "StateError",
    "StateFileNotFoundError",
    "StoreFullError",
    "StoreLockedError",
    "TemplateError",
    "TokenizeError",
    "TokensMismatchError",
    "UnsupportedLayoutError",
    "VersionMismatchError",
]


class LlamaStateError(Exception):
    """Base of every error of this package.

    Parameters
    ----------
    message : str
        One sentence for people.
    **facts
        The values behind it, each readable as an attribute; those named in ``fields`` are ``None`` when not given.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        for name in self.fields:
            setattr(self, name, facts.pop(name, None))
        if facts:
            raise TypeError(f"{type(self).__name__} has no facts named {sorted(facts)}")

    # Exceptions cross process borders (multiprocessing, Ray): the facts have to travel with them. A subclass such
    # as OSError would otherwise be rebuilt from ``args`` alone.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, {name: getattr(self, name) for name in self.fields})


def _rebuild(cls: type[LlamaStateError], message: str, facts: dict[str, Any]) -> LlamaStateError:
    return cls(message, **facts)


# --- the native library ---------------------------------------------------------------------------------------------


class NativeVersionError(LlamaStateError, ImportError):
    """The llama.cpp library found is not the one this package was built against (or none was found)."""

    fields: ClassVar[tuple[str, ...]] = ("expected", "found", "library", "command")
    expected: str | None
    found: str | None
    library: str | None
    command: str | None


# --- model and context ----------------------------------------------------------------------------------------------


class ModelLoadError(LlamaStateError, OSError):
    """A model file could not be loaded. ``reason`` is llama.cpp's own last message where there is one."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason")
    path: str | None
    reason: str | None


class AdapterLoadError(LlamaStateError, OSError):
    """A LoRA adapter could not be loaded, or does not fit the model. ``reason`` says why."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason")
    path: str | None
    reason: str | None


class SequencesNotEmptyError(LlamaStateError, RuntimeError):
    """An operation that would make states wrong while some are held. ``sequences`` are those that hold some."""

    fields: ClassVar[tuple[str, ...]] = ("operation", "sequences")
    operation: str | None
    sequences: tuple[int, ...] | None


class ContextCreateError(LlamaStateError, RuntimeError):
    """llama.cpp made no context from these parameters."""

    fields: ClassVar[tuple[str, ...]] = ("params", "reason")
    params: dict[str, Any] | None
    reason: str | None


class ClosedError(LlamaStateError, ValueError):
    """A model, context, sampler, session or store was used after it had been closed."""

    fields: ClassVar[tuple[str, ...]] = ("what",)
    what: str | None


class NotCopyableError(LlamaStateError, TypeError):
    """What lives in llama.cpp's memory can be neither copied nor pickled. ``instead`` says what can be done."""

    fields: ClassVar[tuple[str, ...]] = ("what", "instead")
    what: str | None
    instead: str | None


class ContextBusyError(LlamaStateError, RuntimeError):
    """Another thread is inside this context and it was made with ``on_busy="raise"``."""

    fields: ClassVar[tuple[str, ...]] = ("operation",)
    operation: str | None


class TokenizeError(LlamaStateError, ValueError):
    """Text could not be turned into tokens, or tokens into text. ``token`` is the first bad id, if one is to blame."""

    fields: ClassVar[tuple[str, ...]] = ("reason", "token", "n_vocab")
    reason: str | None
    token: int | None
    n_vocab: int | None


class TemplateError(LlamaStateError, ValueError):
    """The model carries no chat template, or the template refused these messages."""

    fields: ClassVar[tuple[str, ...]] = ("reason",)
    reason: str | None


class SamplerError(LlamaStateError, ValueError):
    """A sampler cannot be made from these parameters, or it refused a token. ``parameter`` names the culprit."""

    fields: ClassVar[tuple[str, ...]] = ("parameter", "value", "reason")
    parameter: str | None
    value: Any
    reason: str | None


# --- decoding -------------------------------------------------------------------------------------------------------


class DecodeError(LlamaStateError, RuntimeError):
    """``llama_decode`` failed. ``code`` is what it returned; ``removed`` lists sequences whose state had to go."""

    fields: ClassVar[tuple[str, ...]] = ("code", "n_tokens", "removed")
    code: int | None
    n_tokens: int | None
    removed: tuple[int, ...] | None


class NoKVSlotError(DecodeError):
    """The cache has no room for this batch (code 1). Nothing was changed; the context stays usable."""


class DecodeAbortedError(DecodeError):
    """The computation was aborted from outside (code 2)."""


class InvalidBatchError(DecodeError, ValueError):
    """A batch that llama.cpp must not see: bad token, position, size or output mask. ``index`` is the first culprit."""

    fields: ClassVar[tuple[str, ...]] = ("code", "n_tokens", "removed", "reason", "index", "value", "limit")
    reason: str | None
    index: int | None
    value: Any
    limit: Any


class LogitsUnavailableError(LlamaStateError, IndexError):
    """No logits (or embeddings) exist for that index of the last batch."""

    fields: ClassVar[tuple[str, ...]] = ("index", "n_outputs")
    index: int | None
    n_outputs: int | None


class InvalidSequenceError(LlamaStateError, ValueError):
    """A sequence id outside ``[0, n_seq_max)``."""

    fields: ClassVar[tuple[str, ...]] = ("seq_id", "n_seq_max")
    seq_id: Any
    n_seq_max: int | None


class InvalidPositionError(LlamaStateError, ValueError):
    """A position or a range of positions that this sequence does not allow."""

    fields: ClassVar[tuple[str, ...]] = ("reason", "value", "limit")
    reason: str | None
    value: Any
    limit: Any


# --- buffers --------------------------------------------------------------------------------------------------------


class InvalidBufferError(LlamaStateError, TypeError):
    """An object that cannot serve as a buffer here: no buffer protocol, not contiguous, or read-only."""

    fields: ClassVar[tuple[str, ...]] = ("reason", "type")
    reason: str | None
    type: str | None


class BufferTooSmallError(LlamaStateError, ValueError):
    """The caller's buffer is smaller than the state. Nothing was written."""

    fields: ClassVar[tuple[str, ...]] = ("needed", "got")
    needed: int | None
    got: int | None


# --- state ----------------------------------------------------------------------------------------------------------


class StateError(LlamaStateError):
    """Base of all errors about saving and loading state."""


class InvalidFlagsError(StateError, ValueError):
    """State flags that ``llama.h`` does not define. ``known`` is the union of those it does."""

    fields: ClassVar[tuple[str, ...]] = ("flags", "known")
    flags: Any
    known: int | None


class PendingUpdateError(StateError, RuntimeError):
    """Positions of ``seq_ids`` were shifted and llama.cpp has not turned the keys yet; it does at the next decode."""

    fields: ClassVar[tuple[str, ...]] = ("operation", "seq_ids")
    operation: str | None
    seq_ids: tuple[int, ...] | None


class SaveError(StateError, OSError):
    """State could not be written. The old file, if any, is as it was."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason")
    path: str | None
    reason: str | None


class LoadError(StateError, ValueError):
    """State could not be loaded. The context is as it was, but for the sequences in ``removed``, which are empty.

    That happens only where llama.cpp refuses a state that has passed validation (``None`` otherwise).
    """

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "removed")
    path: str | None
    reason: str | None
    removed: tuple[int, ...] | None


class FileAccessError(LoadError, OSError):
    """A state file could not be opened or read. ``code`` is the ``errno``."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "code")
    code: int | None


class StateFileNotFoundError(FileAccessError, FileNotFoundError):
    """There is no such state file."""


class BadMagicError(LoadError):
    """The bytes begin with another magic number than the format's."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "expected", "found")
    expected: int | None
    found: int | None


class VersionMismatchError(LoadError):
    """A format version that this build of llama.cpp does not read."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "expected", "found")
    expected: int | None
    found: int | None


class CorruptStateError(LoadError):
    """The bytes contradict themselves or end too soon. ``offset`` is where, ``section`` which part."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "offset", "section")
    offset: int | None
    section: str | None


class LayoutMismatchError(LoadError):
    """Sound bytes, but of another model or another kind of cache. ``field`` differs: ``expected`` against ``found``."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "field", "expected", "found", "offset")
    field: str | None
    expected: Any
    found: Any
    offset: int | None


class FingerprintMismatchError(LoadError):
    """The state belongs to other weights, adapters or settings. ``field`` names the first that differs."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "field", "expected", "found")
    field: str | None
    expected: Any
    found: Any


class FingerprintUnavailableError(StateError, RuntimeError):
    """What a state depends on cannot be told: the model file is gone, was changed after loading, or never was one."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason")
    path: str | None
    reason: str | None


class TokensMismatchError(StateError, ValueError):
    """Tokens and a sequence are not in step: ``n_tokens`` given, positions ``pos_min`` to ``pos_max`` held."""

    fields: ClassVar[tuple[str, ...]] = ("n_tokens", "pos_min", "pos_max")
    n_tokens: int | None
    pos_min: int | None
    pos_max: int | None


class InsufficientMaxTokensError(LoadError):
    """The file holds more tokens than the caller allowed. ``n_out`` is how many."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "n_out", "max_tokens")
    n_out: int | None
    max_tokens: int | None


class NotEnoughCellsError(LoadError, MemoryError):
    """The state needs more cache cells than are (or ever can be) free."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "needed", "available")
    needed: int | None
    available: int | None


class MediaTokensError(LoadError):
    """A slot file of llama-server with images or audio among its tokens, which only llama-server can place."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "n_chunks")
    n_chunks: int | None


class OnDeviceStateError(LoadError):
    """An ``ON_DEVICE`` blob that is not the last one this context made for that sequence."""

    fields: ClassVar[tuple[str, ...]] = ("path", "reason", "seq_id")
    seq_id: int | None


class UnsupportedLayoutError(StateError, NotImplementedError):
    """A kind of memory whose state format this package cannot check, and so does not load."""

    fields: ClassVar[tuple[str, ...]] = ("arch", "kind", "reason")
    arch: str | None
    kind: str | None
    reason: str | None


# --- sessions, stores, logs -----------------------------------------------------------------------------------------


class InvalidArgumentError(LlamaStateError, ValueError):
    """An argument out of its range. ``name`` says which, ``limit`` what it may be."""

    fields: ClassVar[tuple[str, ...]] = ("name", "value", "limit")
    name: str | None
    value: Any
    limit: Any


class HistoryError(LlamaStateError, IndexError):
    """No such point in a session's history. ``available`` is how many steps there are."""

    fields: ClassVar[tuple[str, ...]] = ("asked", "available")
    asked: Any
    available: int | None


class SequenceChangedError(StateError, RuntimeError):
    """A sequence does not hold what its session left there: somebody else has changed it.

    ``expected`` and ``found`` are numbers of tokens; where they are equal the tokens may be others.
    """

    fields: ClassVar[tuple[str, ...]] = ("seq_id", "expected", "found")
    seq_id: int | None
    expected: int | None
    found: int | None


class SessionNotFoundError(LlamaStateError, KeyError):
    """No session of that name or id."""

    fields: ClassVar[tuple[str, ...]] = ("name",)
    name: str | None

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return self.message


class SessionNameError(LlamaStateError, ValueError):
    """A session name that cannot be a portable file name."""

    fields: ClassVar[tuple[str, ...]] = ("name", "reason")
    name: str | None
    reason: str | None


class SessionExistsError(SessionNameError, FileExistsError):
    """There is a session of that name already."""


class HeadMovedError(LlamaStateError, RuntimeError):
    """Somebody else appended to the log first."""

    fields: ClassVar[tuple[str, ...]] = ("expected", "found")
    expected: str | None
    found: str | None


class EntryNotFoundError(LlamaStateError, KeyError):
    """No entry of the log of ``session`` has that ``hash``."""

    fields: ClassVar[tuple[str, ...]] = ("session", "hash")
    session: str | None
    hash: str | None

    def __str__(self) -> str:
        return self.message


class LogTamperedError(LlamaStateError, ValueError):
    """Entry ``index`` of a session log does not hold the hash chain."""

    fields: ClassVar[tuple[str, ...]] = ("index", "reason")
    index: int | None
    reason: str | None


class StoreLockedError(LlamaStateError, RuntimeError):
    """Another process holds this store or session."""

    fields: ClassVar[tuple[str, ...]] = ("path",)
    path: str | None


class StoreFullError(LlamaStateError, OSError):
    """A store has no room for what was to be put into it."""

    fields: ClassVar[tuple[str, ...]] = ("path", "needed", "available")
    path: str | None
    needed: int | None
    available: int | None


# --- batches ----------------------------------------------------------------------------------------------------------


class InvalidRequestError(LlamaStateError, ValueError):
    """A line of a batch that is no request, or asks for what there is not.

    ``code`` is a word for programs, ``param`` the field to blame, ``line`` the number of the line, from 1.
    """

    fields: ClassVar[tuple[str, ...]] = ("code", "param", "line", "custom_id", "reason")
    code: str | None
    param: str | None
    line: int | None
    custom_id: str | None
    reason: str | None


class BatchChangedError(LlamaStateError, ValueError):
    """The output holds results of another run, or of other requests by the same names. They were left as they are.

    ``field`` is the first option of the run that differs, or "body"; then ``custom_ids`` are some of ``count``.
    """

    fields: ClassVar[tuple[str, ...]] = ("path", "field", "expected", "found", "custom_ids", "count")
    path: str | None
    field: str | None
    expected: Any
    found: Any
    custom_ids: tuple[str, ...] | None
    count: int | None


class OutputMovedError(LlamaStateError, OSError):
    """The output of a batch is not where it was. What was written, ``n_results`` results, is in the file that moved."""

    fields: ClassVar[tuple[str, ...]] = ("path", "n_results", "reason")
    path: str | None
    n_results: int | None
    reason: str | None
