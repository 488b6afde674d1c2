"""What goes into a snapshot beside the state, as sections."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from llamastate import snapfile
from llamastate.arrays import as_bytes_view
from llamastate.errors import InvalidArgumentError, LogitsUnavailableError
from llamastate.sampler import Sampler
from llamastate.snapfile import Kind
from llamastate.words import brief

__all__ = [
    "CheckpointFlags",
    "CheckpointRecord",
    "checkpoint_sections",
    "is_row",
    "json_section",
    "logits_section",
    "sampler_section",
]


class CheckpointFlags(IntFlag):
    """What a checkpoint in a snapshot is."""

    NONE = 0
    PARTIAL = 1
    AUTOMATIC = 2


@dataclass(frozen=True, eq=False)
class CheckpointRecord:
    """A checkpoint as it travels in a snapshot.

    Attributes
    ----------
    n_tokens : int
        How many tokens the sequence held.
    label : str or None
        What it was called.
    created : int or float
        When, in nanoseconds since the epoch.
    flags : int
        :class:`CheckpointFlags`; bits that this version does not know are kept.
    state : buffer or None
        The partial or full state; of an opened snapshot uint8[n], not copied, read-only. None if only the place is
        remembered.
    logits : float32[n_vocab] or None
        What followed the last token.
    """

    n_tokens: int
    label: str | None = None
    created: float = 0
    flags: int = 0
    state: Any = dataclasses.field(default=None, repr=False)
    logits: npt.NDArray[np.float32] | None = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        return (
            f"CheckpointRecord(n_tokens={brief(self.n_tokens)}, label={brief(self.label)}, "
            f"created={brief(self.created)}, flags={brief(self.flags)})"
        )


_ROW = {"n_tokens": (int,), "label": (str, type(None)), "created": (int, float), "flags": (int,)}


def is_row(row: Any) -> bool:
    """Whether this is how a checkpoint stands in its section."""
    if type(row) is not dict or not all(type(row.get(name, ...)) in kinds for name, kinds in _ROW.items()):
        return False
    return bool(0 <= row["n_tokens"] < 1 << 31 and 0 <= row["flags"] < 1 << 32)


def logits_section(given: npt.ArrayLike | str, n_vocab: int) -> npt.NDArray[np.float32] | None:
    """A row of logits, checked; None for "last", which only the context can tell."""
    if isinstance(given, str):
        if given != "last":
            raise InvalidArgumentError(
                f"logits = {brief(given)} is not 'last'", name="logits", value=given, limit="last"
            )
        return None
    try:
        row = np.ascontiguousarray(given, dtype="<f4")
    except (TypeError, ValueError):
        row = np.empty((0, 0), "<f4")
    if row.shape != (n_vocab,):
        raise LogitsUnavailableError(f"logits have shape {row.shape}, not ({n_vocab},)", n_outputs=row.size)
    return row


def sampler_section(given: Sampler | Mapping[str, Any]) -> bytes:
    """What a sampler says of itself, or any mapping, as JSON."""
    return json_section("sampler", given.state if isinstance(given, Sampler) else given)


def checkpoint_sections(records: list[CheckpointRecord]) -> list[tuple[int, int, Any]]:
    """The sections that hold checkpoints, as (kind, number, bytes)."""
    if not records:
        return []
    if 2 * len(records) > snapfile.MAX_SECTIONS - 8:
        raise InvalidArgumentError(
            f"{len(records)} checkpoints: a snapshot takes at most {snapfile.MAX_SECTIONS // 2 - 4}",
            name="checkpoints",
            value=len(records),
            limit=snapfile.MAX_SECTIONS // 2 - 4,
        )
    rows = [{"n_tokens": r.n_tokens, "label": r.label, "created": r.created, "flags": int(r.flags)} for r in records]
    for i, row in enumerate(rows):
        if not is_row(row):
            raise InvalidArgumentError(f"checkpoint {i}: {row!r:.200}", name="checkpoints", value=row)
    try:
        items: list[tuple[int, int, Any]] = [(Kind.CHECKPOINTS, 0, _canonical(rows))]
    except ValueError as error:  # a time that is no number, a label that is no text
        raise InvalidArgumentError(f"checkpoints: {error}", name="checkpoints") from None
    for i, record in enumerate(records):
        if record.state is not None:
            items.append((Kind.CHECKPOINT_STATE, i, as_bytes_view(record.state)))
        if record.logits is not None:
            items.append((Kind.CHECKPOINT_LOGITS, i, np.ascontiguousarray(record.logits, "<f4").reshape(-1)))
    return items


def json_section(name: str, value: Any) -> bytes:
    """A mapping as canonical JSON."""
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise InvalidArgumentError(f"{name} is {kind}, not a mapping", name=name, value=kind)
    try:
        return _canonical(dict(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{name} is not of JSON types: {error}", name=name) from None


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()
