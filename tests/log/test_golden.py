"""Frozen bytes: the encoding, the hashes, JSON Lines and the database, as version 1 has written them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from llamastate.log import (
    AssistantItems,
    CacheUnlocked,
    ConfigChanged,
    Entry,
    HookInjectedItems,
    Kept,
    LlmUsage,
    Locked,
    MemoryLogStore,
    RunOutcome,
    SessionLog,
    SessionOrigin,
    SessionStart,
    SQLiteLogStore,
    ToolResults,
    TurnEnd,
    UnknownEntry,
    UserInput,
    assistant,
    chain,
    export_lines,
    import_jsonl,
    reasoning,
    tool_call,
    tool_result,
    user,
)

GOLDEN = Path(__file__).parent / "golden"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "log.md"

#: Every kind with every field, and values that can be written in more than one way.
TRUNK: list[Entry | UnknownEntry] = [
    SessionStart(ts=1, system_prompt='Zoë\u2028\U0001f600\x7f "\\/\b\f\n\r\t\x00\x1f', config={"é": 1, "z": 2, "Z": 3}),
    UserInput(user("What time is it?"), ts=2),
    AssistantItems([reasoning("Look."), tool_call("c1", "clock", {"zone": None, "on": True})], ts=2),
    ToolResults([tool_result("c1", [0.5, 1e-07, 1e22, 1.0, -0.0, 10**25, -1, 0.1 + 0.2, 5e-324])], ts=3),
    HookInjectedItems([{"type": "x", "nested": [[], {}, ""]}], ts=3),
    AssistantItems([assistant("Noon.")], ts=4),
    LlmUsage(3, 100, 90, 10, 5, ts=4),
    Locked(3, {"snapshot": {"path": "a.llsnap"}}, ts=5),
    TurnEnd(1, ts=6),
    CacheUnlocked(ts=7),
    ConfigChanged({"t": 0}, ts=8),
    ConfigChanged(ts=8),
    UnknownEntry({"kind": "dream", "ts": 9, "of": "a newer version"}),
    RunOutcome({"why": "done"}, True, ts=10),
]


def store() -> MemoryLogStore:
    made = MemoryLogStore()
    trunk = chain(TRUNK)
    made.create("trunk", trunk)
    origin = SessionOrigin("trunk", trunk[8].hash)
    kept = [Kept(2, {"kind": "turn_end", "ts": 6, "turn_count": 1})]
    made.create("fork", chain([SessionStart(ts=11, history=[user("a"), user("b")], forked_from=origin, kept=kept)]))
    made.create("small", chain([SessionStart(ts=12, history=[user("in short")], compacted_from=origin)]))
    return made


def write() -> None:
    """``python -m tests.log.test_golden``: other bytes than these need another version."""
    GOLDEN.mkdir(exist_ok=True)
    lines = list(export_lines(store()))
    GOLDEN.joinpath("v1.jsonl").write_bytes(b"".join(lines))
    GOLDEN.joinpath("v1.db").unlink(missing_ok=True)
    with SQLiteLogStore(GOLDEN / "v1.db") as made:
        import_jsonl(made, lines)


def test_lines() -> None:
    golden = GOLDEN.joinpath("v1.jsonl").read_bytes()
    assert b"".join(export_lines(store())) == golden
    copy = MemoryLogStore()
    assert import_jsonl(copy, golden.splitlines(keepends=True)).sessions == {"trunk": 14, "fork": 1, "small": 1}
    entries = [stored.entry for stored in copy.read("trunk")]
    assert entries == TRUNK


def test_the_chain_by_other_means() -> None:
    """As docs/log.md says it, with the standard library alone."""
    before: dict[str, bytes] = {}
    for line in GOLDEN.joinpath("v1.jsonl").read_bytes().splitlines():
        facts = json.loads(line)
        data = line[line.index(b'"entry":') + 8 : -1]
        canonical = json.dumps(facts["entry"], ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        assert data == canonical
        last = before.get(facts["session"], bytes(32))
        digest = hashlib.blake2b(last + data, digest_size=32).digest()
        assert digest.hex() == facts["hash"]
        assert facts["prev_hash"] == (last.hex() if facts["index"] else None)
        before[facts["session"]] = digest


def test_the_database(tmp_path: Path) -> None:
    path = shutil.copy(GOLDEN / "v1.db", tmp_path)
    with SQLiteLogStore(path) as made:
        assert b"".join(export_lines(made)) == GOLDEN.joinpath("v1.jsonl").read_bytes()
        assert made.sessions() == store().sessions()
        SessionLog.open(made, "trunk").save_turn_end(2)


def test_what_the_documentation_shows() -> None:
    shown = re.findall(r"^\| `(\{.*\})` \| `(\w+)…(\w+)` \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == 3
    for stored, (data, first, last) in zip(chain([data.encode() for data, _, _ in shown]), shown, strict=True):
        assert (stored.hash[:8], stored.hash[-len(last) :]) == (first, last), data
    entries = [
        SessionStart(ts=1700000000000, system_prompt="Be brief.", config={"t": 0.5, "max": 16}),
        UserInput(user("Zoë: 1 < 2?"), ts=1700000000001),
        TurnEnd(1, ts=1700000000002),
    ]
    assert [stored.data.decode() for stored in chain(entries)] == [data for data, _, _ in shown]


if __name__ == "__main__":
    write()
