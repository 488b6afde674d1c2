"""What a history is made of: messages, tool calls and their results, reasoning, and others.

An item is a JSON object, kept as it is. Two ways of writing one are understood: chat messages (``role``) and typed
items (``type``), as programs have them that speak to OpenAI-like interfaces. What is understood decides in which entry
an item is recorded, and how a chat template gets to see it; never what is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec

from llamastate.errors import InvalidArgumentError
from llamastate.log.entries import AssistantItems, Entry, HookInjectedItems, Item, ToolResults, UserInput

__all__ = ["assistant", "group", "item_kind", "reasoning", "to_messages", "tool_call", "tool_result", "user"]

_CALLS = {"tool_call", "tool_use"}
_RESULTS = {"tool_result", "tool_call_output"}
_REASONING = {"reasoning", "thinking"}


def user(content: Any) -> Item:
    """Make a message of the user."""
    return {"type": "message", "role": "user", "content": content}


def assistant(content: Any) -> Item:
    """Make a message of the model."""
    return {"type": "message", "role": "assistant", "content": content}


def reasoning(text: str) -> Item:
    """Make an item of what the model has thought."""
    return {"type": "reasoning", "text": text}


def tool_call(call_id: str, name: str, arguments: Any) -> Item:
    """Make a call of a tool; ``arguments`` are JSON types."""
    return {"type": "tool_call", "call_id": call_id, "name": name, "arguments": arguments}


def tool_result(call_id: str, content: Any) -> Item:
    """Make the answer of a tool."""
    return {"type": "tool_result", "call_id": call_id, "content": content}


def item_kind(item: Mapping[str, Any]) -> str:
    """What an item is: "user", "assistant", "tool_call", "tool_result", "reasoning" or "other".

    Parameters
    ----------
    item : mapping
        Told by ``type`` (anything that ends in ``_call`` is a call, in ``_call_output`` its result), without one or for
        "message" by ``role``.
    """
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "message":
        if role == "user" or role == "assistant":
            return str(role)
        return "tool_result" if role == "tool" or role == "function" else "other"
    if not isinstance(kind, str):
        return "other"
    if kind in _RESULTS or kind.endswith("_call_output"):
        return "tool_result"
    if kind in _CALLS or kind.endswith("_call"):
        return "tool_call"
    return "reasoning" if kind in _REASONING else "other"


def as_items(items: Iterable[Any], what: str = "items") -> list[Item]:
    """Turn what callers have into items: dicts as they are, other mappings, msgspec structs and dataclasses.

    Raises
    ------
    InvalidArgumentError
    """
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise InvalidArgumentError(f"{what} is {type(items).__name__}, not a sequence of items", name=what, value=items)
    return [_as_item(item, f"{what}[{i}]") for i, item in enumerate(items)]


def _as_item(item: Any, what: str) -> Item:
    if type(item) is dict:
        return item
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, msgspec.Struct) or (dataclasses.is_dataclass(item) and not isinstance(item, type)):
        built = msgspec.to_builtins(item)
        if isinstance(built, dict):
            return built
    raise InvalidArgumentError(f"{what} is {type(item).__name__}, not an item", name=what, value=item)


def _place(item: Item) -> str:
    kind = item_kind(item)
    return "assistant" if kind in ("assistant", "tool_call", "reasoning") else kind


def group(items: Sequence[Item], ts: int) -> list[Entry]:
    """The entries that record these items.

    Parameters
    ----------
    items : sequence of dict
    ts : int
        Their time.

    Returns
    -------
    list of Entry
        A :class:`UserInput` for each message of the user, an :class:`AssistantItems` for each run of messages of the
        model, tool calls and reasoning, a :class:`ToolResults` for each run of results, a :class:`HookInjectedItems`
        for each other item.
    """
    entries: list[Entry] = []
    for place, run in groupby(items, _place):
        if place == "assistant":
            entries.append(AssistantItems(list(run), ts=ts))
        elif place == "tool_result":
            entries.append(ToolResults(list(run), ts=ts))
        elif place == "user":
            entries += [UserInput(item, ts=ts) for item in run]
        else:
            entries += [HookInjectedItems([item], ts=ts) for item in run]
    return entries


# --- for chat templates -----------------------------------------------------------------------------------------------


def to_messages(history: Iterable[Item], system_prompt: str | None = None) -> list[dict[str, Any]]:
    """A history as chat messages, such as :meth:`Model.apply_chat_template` takes them.

    Parameters
    ----------
    history : iterable of dict
    system_prompt : str, optional
        Becomes the first message.

    Returns
    -------
    list of dict
        Calls go into ``tool_calls`` of the message of the model that they stand beside, reasoning into its
        ``reasoning_content``; results become messages of the role "tool". Chat messages stay as they are.
    """
    messages: list[dict[str, Any]] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    for place, run in groupby(history, _place):
        if place == "assistant":
            messages += _assistant_messages(run)
        elif place == "tool_result":
            messages += [_result(item) for item in run]
        else:
            messages += [_message(item) for item in run]
    return messages


def _assistant_messages(run: Iterable[Item]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    open_message: dict[str, Any] | None = None  # calls, and a message after reasoning, join it
    for item in run:
        kind = item_kind(item)
        if kind == "assistant" and (open_message is None or "content" in open_message):
            open_message = _message(item)
            made.append(open_message)
            continue
        spoken = open_message is not None and not open_message.keys().isdisjoint(("content", "tool_calls"))
        if open_message is None or (kind == "reasoning" and spoken):
            open_message = {"role": "assistant"}
            made.append(open_message)
        if kind == "assistant":
            open_message.update(_message(item))
        elif kind == "reasoning":
            text = open_message.get("reasoning_content", "") + _text(item)
            open_message["reasoning_content"] = text
        else:
            open_message.setdefault("tool_calls", []).append(_call(item))
    for message in made:
        message.setdefault("content", "")
    return made


def _message(item: Item) -> dict[str, Any]:
    message = {name: value for name, value in item.items() if name != "type"}
    message.setdefault("role", "system")
    message["content"] = _text(item)
    return message


def _call(item: Item) -> dict[str, Any]:
    arguments = item.get("arguments", item.get("input", {}))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # templates want to write the arguments themselves
            arguments = json.loads(arguments)
    call_id = item.get("call_id", item.get("id"))
    return {"id": call_id, "type": "function", "function": {"name": item.get("name"), "arguments": arguments}}


def _result(item: Item) -> dict[str, Any]:
    if item.get("type", "message") == "message":
        return _message(item)
    return {"role": "tool", "tool_call_id": item.get("call_id", item.get("id")), "content": _text(item)}


def _text(item: Item) -> str:
    for name in ("content", "text", "output", "summary"):
        value = item.get(name)
        if value is not None:
            return _flat(value)
    return ""


def _flat(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part) if isinstance(part, dict) else _flat(part) for part in value)
    return json.dumps(value, ensure_ascii=False)
