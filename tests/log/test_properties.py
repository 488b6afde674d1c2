"""What holds of any log: hypothesis makes them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamastate.errors import InvalidArgumentError, LogTamperedError
from llamastate.log import (
    AssistantItems,
    CacheUnlocked,
    ConfigChanged,
    HookInjectedItems,
    LlmUsage,
    Locked,
    MemoryLogStore,
    RunOutcome,
    SessionLog,
    StoredEntry,
    ToolResults,
    TurnEnd,
    UnknownEntry,
    UserInput,
    assistant,
    canonical,
    chain,
    export_lines,
    fold,
    import_jsonl,
    item_kind,
    reasoning,
    tool_call,
    tool_result,
    user,
)
from llamastate.log.entries import decode, plain

quick = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=4)
WORDS = st.sampled_from(["message", "tool_call", "function_call_output", "reasoning", "x", None, 5, []])
ROLES = st.sampled_from(["user", "assistant", "tool", "system", "developer", None, {}])
ITEMS = (
    OBJECTS
    | st.builds(lambda kind, role, more: {**more, "type": kind, "role": role}, WORDS, ROLES, OBJECTS)
    | st.builds(lambda role, text: {"role": role, "content": text}, ROLES, JSON)
    | st.builds(user, JSON)
    | st.builds(assistant, JSON)
    | st.builds(reasoning, TEXT)
    | st.builds(tool_call, TEXT, TEXT, JSON)
    | st.builds(tool_result, TEXT, JSON)
)
COUNTS = st.integers(0, 10**12)
TIMES = st.integers(0, 2**50)
STRANGE = st.builds(
    lambda kind, ts, more: UnknownEntry({**more, "kind": kind, "ts": ts}),
    st.sampled_from(["dream", "Turn_End", "", "\u2028"]), TIMES, OBJECTS,
)  # fmt: skip
#: Entries of known kinds, with a field that this version does not know.
NEWER = st.sampled_from(["user_input", "turn_end", "locked", "llm_usage", "config_changed", "run_outcome"]).flatmap(
    lambda kind: st.builds(
        lambda n, item, extra: UnknownEntry({
            "kind": kind, "ts": n, "novelty": extra,
            **{
                "user_input": {"item": item}, "turn_end": {"turn_count": n}, "config_changed": {"config": item},
                "locked": {"locked_prefix_len": n, "state": item}, "llm_usage": {"history_len": n},
                "run_outcome": {"outcome": item},
            }[kind],
        }),
        COUNTS, OBJECTS, JSON,
    )
)  # fmt: skip
ENTRIES = st.one_of(
    st.builds(UserInput, ITEMS, ts=TIMES),
    st.builds(AssistantItems, st.lists(ITEMS, max_size=3), ts=TIMES),
    st.builds(ToolResults, st.lists(ITEMS, max_size=3), ts=TIMES),
    st.builds(HookInjectedItems, st.lists(ITEMS, max_size=2), ts=TIMES),
    st.builds(TurnEnd, COUNTS, ts=TIMES),
    st.builds(RunOutcome, JSON, st.booleans(), ts=TIMES),
    st.builds(LlmUsage, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, ts=TIMES),
    st.builds(Locked, COUNTS, st.none() | OBJECTS, ts=TIMES),
    st.builds(CacheUnlocked, ts=TIMES),
    st.builds(ConfigChanged, st.none() | OBJECTS, ts=TIMES),
    STRANGE,
    NEWER,
)
LOGS = st.lists(ENTRIES, max_size=12)


def log_of(entries: list[Any], store: MemoryLogStore | None = None, **start: Any) -> SessionLog:
    log = SessionLog.create(store or MemoryLogStore(), **start)
    log.append(*entries)
    return log


@quick
@given(LOGS, st.integers(0, 13), st.lists(ITEMS, max_size=3))
def test_folding_in_parts_is_folding(entries: list[Any], cut: int, history: list[Any]) -> None:
    stored = list(log_of(entries, history=history, system_prompt="x").entries())
    whole = fold(stored)
    first = fold(stored[:cut])
    before = fold(stored[:cut])
    assert fold(stored[cut:], first) == whole
    assert first == before, "the state of the first part was changed"


@quick
@given(LOGS, LOGS, OBJECTS)
def test_a_fork_restores_to_the_same(entries: list[Any], later: list[Any], config: dict[str, Any]) -> None:
    """And goes on the same, also as a fork of a fork, which keeps what no version here understands."""
    log = log_of(entries, config=config, system_prompt="x", history=[user("a")])
    state = log.restore()
    fork = log.fork().fork()
    assert fork.restore() == state
    strange = [k.entry for k in fork.restore().unknown]
    for entry in entries:
        if isinstance(entry, UnknownEntry):
            assert {name: value for name, value in entry.data.items() if name != "item"} in strange
    log.append(*later)
    fork.append(*later)
    assert fork.restore() == log.restore()


@quick
@given(st.lists(st.lists(ITEMS, max_size=6), max_size=4))
def test_what_is_saved_comes_back(parts: list[list[Any]]) -> None:
    log = SessionLog.create(MemoryLogStore())
    for part in parts:
        log.save_delta(part)
    flat = list(itertools.chain(*parts))
    found = log.restore().history
    assert found == flat
    assert [canonical(item) for item in found] == [canonical(item) for item in flat], (
        "1 and 1.0 are equal, not the same"
    )


@quick
@given(st.lists(ITEMS, max_size=8))
def test_items_are_grouped_by_what_they_are(items: list[Any]) -> None:
    log = SessionLog.create(MemoryLogStore())
    log.save_delta(items)
    places = {"user": "user_input", "tool_result": "tool_results", "other": "hook_injected_items"}
    expected: list[tuple[str, list[Any]]] = []
    for item in items:
        place = places.get(item_kind(item), "assistant_items")
        joins = place in ("assistant_items", "tool_results")
        if joins and expected and expected[-1][0] == place:
            expected[-1][1].append(item)
        else:
            expected.append((place, [item]))
    found = [stored.entry for stored in log.entries()][1:]
    assert [(e.kind, [e.item] if isinstance(e, UserInput) else e.items) for e in found] == expected
    assert len({e.ts for e in found}) <= 1


@quick
@given(LOGS, LOGS)
def test_export_and_import_are_the_identity(one: list[Any], other: list[Any]) -> None:
    store, copy = MemoryLogStore(), MemoryLogStore()
    log = log_of(one, store)
    log.fork()
    log_of(other, store, session_id="ünïcödé €")
    lines = list(export_lines(store))
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in lines)
    done = import_jsonl(copy, lines)
    assert done.broken == {}
    assert list(export_lines(copy)) == lines
    assert copy.sessions() == store.sessions()
    for info in store.sessions():
        assert list(copy.read(info.id)) == list(store.read(info.id))


@quick
@given(ENTRIES)
def test_bytes_are_canonical(entry: Any) -> None:
    """Encoding what was decoded gives the same bytes, and they are what Python's own json writes."""
    import json

    (stored,) = chain([entry])
    assert (
        json.dumps(json.loads(stored.data), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        == stored.data
    )
    assert canonical(plain(stored.data)) == stored.data
    again = decode(stored.data)
    assert chain([again.entry if again.raw is None else UnknownEntry(again.raw)]) == [stored]


@pytest.mark.parametrize("every", [1])
def test_any_changed_byte_is_found(every: int) -> None:
    """Every bit of every byte of entries, hashes and places, in memory; test_damage.py does it to a database."""
    store = MemoryLogStore()
    log = log_of([TurnEnd(1, ts=5), UserInput(user("hi"), ts=6), CacheUnlocked(ts=7)], store)
    good = list(store.read(log.id))
    for i, stored in enumerate(good):
        changed = [
            StoredEntry(
                i, stored.hash, stored.prev_hash, stored.data[:at] + bytes([byte ^ 1 << bit]) + stored.data[at + 1 :]
            )
            for at, byte in enumerate(stored.data)
            for bit in range(8)
        ]
        changed += [
            StoredEntry(
                i,
                stored.hash[:at] + ("0" if digit != "0" else "1") + stored.hash[at + 1 :],
                stored.prev_hash,
                stored.data,
            )
            for at, digit in enumerate(stored.hash)
        ]
        changed += [
            StoredEntry(i, stored.hash, stored.prev_hash, stored.data[:-1]),
            StoredEntry(i, stored.hash, stored.prev_hash, stored.data + b" "),
            StoredEntry(i, stored.hash, "00" * 32, stored.data),
            StoredEntry(i + 1, stored.hash, stored.prev_hash, stored.data),
        ]
        for bad in changed:
            store._logs[log.id] = [*good[:i], bad, *good[i + 1 :]]
            with pytest.raises(LogTamperedError) as caught:
                log.verify()
            assert caught.value.index == i, (bad, caught.value)
            with pytest.raises(LogTamperedError):
                log.restore()
    store._logs[log.id] = good
    assert log.verify() == 4


class Odd:
    pass


@pytest.mark.parametrize(
    "item",
    [
        {"a": float("nan")}, {"a": float("inf")}, {1: "a"}, {None: 1}, {"a": (1, 2)}, {"a": {1, 2}}, {"a": b"x"},
        {"a": "\ud800"}, {"a": Odd()}, {"\ud800": 1}, "text", None, 5, ["a"], Odd(), Odd,
    ],
)  # fmt: skip
def test_what_would_not_come_back_is_refused(item: Any) -> None:
    log = SessionLog.create(MemoryLogStore())
    for call in (
        lambda: log.save_delta([user("fine"), item]),
        lambda: SessionLog.create(log.store, history=[item]),
        lambda: log.compact([item]),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
    assert log.n_entries == log.verify() == len(log.store.sessions()) == 1


def test_too_deep_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    log = SessionLog.create(MemoryLogStore())
    with pytest.raises(InvalidArgumentError):
        log.save_delta([deep])
    assert log.n_entries == 1
    while deep:  # Python would free it recursively
        deep = deep["a"]
