"""The log of a session: what happened in it, hash-chained, and enough to bring it back.

An entry is a JSON object. It is encoded once, and from then on its bytes are what is stored, hashed, exported and
imported (docs/log.md), so that fields and kinds of a newer version go through an older one unharmed.

``entries``, ``items``     what is recorded, and what histories are made of
``chaining``, ``folding``  from entries to hashes, and from entries to the state of a session
``store``                  what a store has to do; ``memory``, ``sqlite``, ``rescue``, ``conformance``
``sessionlog``, ``aio``    one session's log, for threads and for asyncio
``jsonl``, ``tree``        logs as text; forks as a picture
``states``, ``resuming``   from a log to a live :class:`~llamastate.Session`; all else here needs no model

A fork copies the folded state into a first entry of its own and names the entry that it comes from. It shares nothing
with its origin: each log can be verified, exported and kept alone, and damage to one is not damage to many.
"""

from llamastate.log.aio import AsyncSessionLog
from llamastate.log.chaining import StoredEntry, chain, chain_hash
from llamastate.log.entries import (
    AssistantItems,
    CacheUnlocked,
    ConfigChanged,
    Entry,
    HookInjectedItems,
    Kept,
    LlmUsage,
    Locked,
    RunOutcome,
    SessionOrigin,
    SessionStart,
    ToolResults,
    TurnEnd,
    UnknownEntry,
    UserInput,
    canonical,
)
from llamastate.log.folding import RestoredState, StateReference, fold
from llamastate.log.items import (
    assistant,
    group,
    item_kind,
    reasoning,
    to_messages,
    tool_call,
    tool_result,
    user,
)
from llamastate.log.jsonl import Imported, export_jsonl, export_lines, import_jsonl
from llamastate.log.memory import MemoryLogStore
from llamastate.log.rescue import salvage
from llamastate.log.resuming import Resumed, aresume, branch, lock_session, render, resume, resume_log, sync_text
from llamastate.log.sessionlog import SessionLog, new_session_id
from llamastate.log.sqlite import SQLiteLogStore
from llamastate.log.store import Head, LogInfo, LogStore
from llamastate.log.tree import Branch, forest, tree_dot, tree_svg, tree_text

__all__ = [
    "AssistantItems",
    "AsyncSessionLog",
    "Branch",
    "CacheUnlocked",
    "ConfigChanged",
    "Entry",
    "Head",
    "HookInjectedItems",
    "Imported",
    "Kept",
    "LlmUsage",
    "Locked",
    "LogInfo",
    "LogStore",
    "MemoryLogStore",
    "RestoredState",
    "Resumed",
    "RunOutcome",
    "SQLiteLogStore",
    "SessionLog",
    "SessionOrigin",
    "SessionStart",
    "StateReference",
    "StoredEntry",
    "ToolResults",
    "TurnEnd",
    "UnknownEntry",
    "UserInput",
    "aresume",
    "assistant",
    "branch",
    "canonical",
    "chain",
    "chain_hash",
    "export_jsonl",
    "export_lines",
    "fold",
    "forest",
    "group",
    "import_jsonl",
    "item_kind",
    "lock_session",
    "new_session_id",
    "reasoning",
    "render",
    "resume",
    "resume_log",
    "salvage",
    "sync_text",
    "to_messages",
    "tool_call",
    "tool_result",
    "tree_dot",
    "tree_svg",
    "tree_text",
    "user",
]
