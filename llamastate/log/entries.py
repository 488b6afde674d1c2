"""What a session log records: the kinds of entries, and how entries become bytes and come back.

Kinds and fields that this version does not know belong to a newer one. They are kept as they are: the bytes of an entry
are stored, hashed, exported and imported, and never written anew from what was understood of them.
"""

from __future__ import annotations

import json
import time
from typing import Any, ClassVar

import msgspec

from llamastate.errors import InvalidArgumentError

__all__ = [
    "AssistantItems",
    "CacheUnlocked",
    "ConfigChanged",
    "Entry",
    "HookInjectedItems",
    "Kept",
    "LlmUsage",
    "Locked",
    "RunOutcome",
    "SessionOrigin",
    "SessionStart",
    "ToolResults",
    "TurnEnd",
    "UnknownEntry",
    "UserInput",
    "canonical",
    "decode",
    "encode",
    "now_ms",
]

Item = dict[str, Any]

#: Levels of objects and lists in an entry. Parsers recurse, and how deep they can depends on who calls them: what was
#: recorded has to be readable from anywhere.
MAX_DEPTH = 200


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """What all entries have.

    Attributes
    ----------
    ts : int
        When it was made, in milliseconds since the epoch; now, if not given.
    """

    ts: int = msgspec.field(default_factory=now_ms)

    @property
    def kind(self) -> str:
        """Which kind it is, as in the JSON."""
        return str(self.__struct_config__.tag)


class SessionOrigin(msgspec.Struct, frozen=True):
    """An entry of another session: ``at_hash`` is the last one that the new session has taken over.

    Attributes
    ----------
    session_id, at_hash : str
    """

    session_id: str
    at_hash: str


class Kept(msgspec.Struct, frozen=True):
    """An entry that a fork takes along beside the history: usage, states, what a newer version wrote.

    Attributes
    ----------
    history_len : int
        How many items were before it.
    entry : dict
        The entry as it was, as JSON types. What it added to the history is not repeated.
    """

    history_len: int
    entry: dict[str, Any]


class SessionStart(Entry, frozen=True, tag="session_start", forbid_unknown_fields=True):
    """The first entry of every session, and the only one of its kind in it.

    Attributes
    ----------
    system_prompt : str or None
    config : dict or None
        How the model is asked; JSON types, otherwise the caller's.
    history : list of dict
        Items that the session begins with.
    forked_from, compacted_from : SessionOrigin or None
        Where it comes from.
    kept : list of Kept
        What a fork takes along.
    """

    system_prompt: str | None = None
    config: dict[str, Any] | None = None
    history: list[Item] = msgspec.field(default_factory=list)
    forked_from: SessionOrigin | None = None
    compacted_from: SessionOrigin | None = None
    kept: list[Kept] = msgspec.field(default_factory=list)


class UserInput(Entry, frozen=True, tag="user_input", forbid_unknown_fields=True):
    """One message of the user.

    Attributes
    ----------
    item : dict
    """

    item: Item


class AssistantItems(Entry, frozen=True, tag="assistant_items", forbid_unknown_fields=True):
    """What the model has said, called and thought, in one go.

    Attributes
    ----------
    items : list of dict
    """

    items: list[Item]


class ToolResults(Entry, frozen=True, tag="tool_results", forbid_unknown_fields=True):
    """What tools have answered.

    Attributes
    ----------
    items : list of dict
    """

    items: list[Item]


class HookInjectedItems(Entry, frozen=True, tag="hook_injected_items", forbid_unknown_fields=True):
    """Items of any other origin.

    Attributes
    ----------
    items : list of dict
    """

    items: list[Item]


class TurnEnd(Entry, frozen=True, tag="turn_end", forbid_unknown_fields=True):
    """A turn is over.

    Attributes
    ----------
    turn_count : int
        How many there have been.
    """

    turn_count: int


class RunOutcome(Entry, frozen=True, tag="run_outcome", forbid_unknown_fields=True):
    """How a run has ended.

    Attributes
    ----------
    outcome : JSON type
        The caller's word for it.
    interrupted : bool
        Whether somebody stopped it.
    """

    outcome: Any
    interrupted: bool = False


class LlmUsage(Entry, frozen=True, tag="llm_usage", forbid_unknown_fields=True):
    """What one request to the model took.

    Attributes
    ----------
    history_len : int
        Items that were sent.
    input_total_tokens : int
        Tokens of the whole prompt, whether computed or found in a cache.
    cache_read_tokens, cache_write_tokens : int
        Of these, how many came from a cache, and how many were put into one.
    output_tokens : int
    """

    history_len: int
    input_total_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0


class Locked(Entry, frozen=True, tag="locked", forbid_unknown_fields=True):
    """The beginning of the history is fixed from now on, so that its state can be kept.

    Attributes
    ----------
    locked_prefix_len : int
        How many items.
    state : dict or None
        Where that state is: ``{"snapshot": {...}}`` as :func:`llamastate.log.lock_session` writes it. Other members
        are left alone.
    """

    locked_prefix_len: int
    state: dict[str, Any] | None = None


class CacheUnlocked(Entry, frozen=True, tag="cache_unlocked", forbid_unknown_fields=True):
    """The history may change from its beginning on again."""


class ConfigChanged(Entry, frozen=True, tag="config_changed", forbid_unknown_fields=True):
    """Another configuration.

    Attributes
    ----------
    config : dict or None
    """

    config: dict[str, Any] | None = None


class UnknownEntry(msgspec.Struct, frozen=True):
    """An entry of a kind that this version does not know.

    Attributes
    ----------
    data : dict
        All of it, as JSON types.
    """

    data: dict[str, Any]

    @property
    def kind(self) -> str:
        """Which kind it is."""
        data: Any = self.data
        kind = data.get("kind") if isinstance(data, dict) else None
        return kind if isinstance(kind, str) else ""

    @property
    def ts(self) -> int:
        """When it was made, in milliseconds; 0 if it does not say."""
        ts = self.data.get("ts")
        return ts if isinstance(ts, int) else 0


Known = (
    SessionStart
    | UserInput
    | AssistantItems
    | ToolResults
    | HookInjectedItems
    | TurnEnd
    | RunOutcome
    | LlmUsage
    | Locked
    | CacheUnlocked
    | ConfigChanged
)
_CLASSES: dict[str, type[Entry]] = {str(cls.__struct_config__.tag): cls for cls in Known.__args__}
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Known)
_plain: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


class Decoded(msgspec.Struct, frozen=True, gc=False):
    """An entry, and what of it only a newer version understands.

    Attributes
    ----------
    entry : Entry or UnknownEntry
    raw : dict or None
        The whole entry, if it has fields that ``entry`` lacks.
    """

    entry: Entry | UnknownEntry
    raw: dict[str, Any] | None = None


def decode(data: bytes) -> Decoded:
    """Read an entry.

    Raises
    ------
    ValueError
        It is none: no JSON object, no kind, or a known kind whose fields are of other types. A newer version that means
        something else by a kind has to give it another name.
    """
    try:
        try:
            return Decoded(_decoder.decode(data))
        except msgspec.ValidationError:
            return from_raw(_plain.decode(data))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_raw(raw: Any) -> Decoded:
    """Read an entry that is JSON types already; :func:`decode` says what is refused."""
    if not isinstance(raw, dict) or not isinstance(raw.get("kind"), str):
        raise ValueError("it is no object with a kind")
    cls = _CLASSES.get(raw["kind"])
    if cls is None:
        return Decoded(UnknownEntry(raw))
    names = {*cls.__struct_fields__, "kind"}
    known = {name: value for name, value in raw.items() if name in names}
    return Decoded(msgspec.convert(known, cls), raw if len(known) < len(raw) else None)


def plain(data: bytes) -> dict[str, Any]:
    """An entry as JSON types."""
    raw: dict[str, Any] = _plain.decode(data)
    return raw


def to_raw(entry: Entry | UnknownEntry) -> dict[str, Any]:
    """Turn an entry into JSON types; nothing in it is copied."""
    if isinstance(entry, UnknownEntry):
        return entry.data
    return {"kind": entry.kind, **_fields(entry)}


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    defaults = struct.__struct_defaults__
    names = struct.__struct_fields__
    for name, default in zip(names, (*[_Never] * (len(names) - len(defaults)), *defaults), strict=True):
        value = getattr(struct, name)
        if name != "ts" and (value == default or (not value and isinstance(value, list))) and default is not _Never:
            continue
        if isinstance(value, SessionOrigin):
            value = _fields(value)
        elif name == "kept":
            value = [_fields(kept) for kept in value]
        fields[name] = value
    return fields


class _Never:
    """A default that no value equals."""

    __hash__: ClassVar[None] = None  # type: ignore[assignment]


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def canonical(value: Any) -> bytes:
    """JSON as it is hashed: sorted keys, no spaces, UTF-8, nothing escaped that need not be (docs/log.md).

    Raises
    ------
    ValueError
        It cannot be written: NaN and infinities, half a character, something that is no JSON type.
    """
    try:
        return _encoder.encode(value).encode()
    except TypeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check_depth(raw: dict[str, Any]) -> None:
    # what a fork takes along lies a few levels deeper in it than where it comes from
    limit = MAX_DEPTH + (8 if raw.get("kind") == "session_start" else 0)
    level: list[Any] = [raw]
    for _ in range(limit):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def encode(entry: Entry | UnknownEntry) -> bytes:
    """The bytes of an entry.

    Raises
    ------
    InvalidArgumentError
        Something in it would not come back as it is: NaN, keys that are no strings, tuples, objects; or it is nested
        more than :data:`MAX_DEPTH` levels deep.
    """
    try:
        raw = to_raw(entry)
        data = canonical(raw)
        if not isinstance(raw, dict):
            raise ValueError("it is no object with a kind")
        if data.count(b"{") + data.count(b"[") > MAX_DEPTH:
            _check_depth(raw)
        if _plain.decode(data) != raw:
            raise ValueError("it would not come back the same: only str keys, lists, dicts and numbers do")
        decode(data)
    except (ValueError, RecursionError) as error:
        kind = getattr(entry, "kind", type(entry).__name__)
        raise InvalidArgumentError(f"this {kind} cannot be recorded: {error}", name=kind, limit="JSON") from None
    return data
