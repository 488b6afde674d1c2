"""``llamastate log``."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from llamastate.cli import main
from llamastate.log import SessionLog, SQLiteLogStore, assistant, reasoning, tool_call, tool_result, user


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A conversation, a fork in its middle, a compaction of the fork."""
    path = tmp_path / "log.db"
    with SQLiteLogStore(path) as store:
        log = SessionLog.create(store, session_id="chat", system_prompt="Be brief.", config={"t": 0})
        at = log.save_delta([user("What time is it?\n\x1b[31m"), reasoning("Look."), tool_call("1", "clock", {})])
        log.save_delta([tool_result("1", "noon"), assistant("Noon.")])
        log.save_turn_end(1)
        fork = log.fork_at(at, session_id="chat-fork")
        fork.compact([user('<time> & "space"')], session_id="small")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main(["log", *map(str, arguments)]) == status
    return capsys.readouterr().out


def test_ls(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "ls", path, "--json"))
    assert [row["id"] for row in rows] == ["small", "chat-fork", "chat"]
    assert (rows[1]["relation"], rows[1]["origin"]["session_id"]) == ("fork", "chat")
    text = run(capsys, "ls", path, "--limit", 2)
    assert "fork of chat" in text
    assert text.count("\n") == 3


def test_show(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "show", path, "chat", "--json"))
    assert [row["entry"]["kind"] for row in rows] == [
        "session_start", "user_input", "assistant_items", "tool_results", "assistant_items", "turn_end",
    ]  # fmt: skip
    assert rows[1]["prev_hash"] == rows[0]["hash"]
    text = run(capsys, "show", path, "chat")
    assert "reasoning: Look.; tool_call: clock" in text
    assert "\x1b" not in text, "what a log holds must not command the terminal"
    state = json.loads(run(capsys, "show", path, "sm", "--state", "--json"))
    assert (state["id"], len(state["history"]), state["system_prompt"]) == ("small", 1, "Be brief.")
    assert "turn_count          1" in run(capsys, "show", path, "chat", "--state")
    assert main(["log", "show", str(path), "c"]) == 1
    assert "2 sessions" in capsys.readouterr().err
    assert main(["log", "show", str(path), "x"]) == 1


def test_verify(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", path).count("ok (") == 3
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE entries SET data = CAST(replace(data, 'noon', 'four') AS BLOB) WHERE place % 65536 = 3")
    raw.close()
    text = run(capsys, "verify", path, status=1)
    assert "chat: FAILED: entry 3 was changed" in text
    facts = json.loads(run(capsys, "verify", path, "--json", status=1))
    assert [(f["id"], f["ok"], f["index"]) for f in facts] == [
        ("chat", False, 3), ("chat-fork", True, None), ("small", True, None),
    ]  # fmt: skip
    run(capsys, "verify", path, "small")
    run(capsys, "show", path, "chat")


def test_tree(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "tree", path).splitlines()
    assert [line[: line.index("  1 e" if "chat-fork" in line or "small" in line else "  6 e")] for line in lines] == [
        "chat",
        "└─ chat-fork",
        "   └─ small",
    ]
    assert lines[1].endswith("forked at entry 2")
    assert lines[2].endswith("compacted at entry 0")
    assert run(capsys, "tree", path, "small").splitlines() == lines
    dot = run(capsys, "tree", path, "--dot")
    assert '"chat" -> "chat-fork" [label="fork at 2"];' in dot
    assert "style=dashed" in dot
    svg = ET.fromstring(run(capsys, "tree", path, "--svg"))
    assert len(svg.findall("{http://www.w3.org/2000/svg}circle")) == 3
    assert len(svg.findall("{http://www.w3.org/2000/svg}path")) == 2
    rows = json.loads(run(capsys, "tree", path, "--json"))
    assert [(row["id"], row["at_index"]) for row in rows] == [("chat", None), ("chat-fork", 2), ("small", 0)]


def test_export_and_import(path: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    file, other = tmp_path / "all.jsonl", tmp_path / "other.db"
    assert main(["log", "export", str(path), "-o", str(file)]) == 0
    assert main(["log", "import", str(other), str(file)]) == 0
    assert capsysbinary.readouterr().out == b"chat: 6 entries\nchat-fork: 1 entries\nsmall: 1 entries\n"
    assert main(["log", "export", str(other)]) == 0
    assert capsysbinary.readouterr().out == file.read_bytes()
    assert main(["log", "import", str(other), str(file)]) == 1, "they are there already"
    assert main(["log", "export", str(path), "small"]) == 0
    assert capsysbinary.readouterr().out.count(b"\n") == 1
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 1])
    assert main(["log", "export", str(path), "-o", str(tmp_path / "no")]) == 1
    assert not (tmp_path / "no").exists()
    assert main(["log", "export", str(path), "--damaged", "-o", str(tmp_path / "some")]) == 0
    assert main(["log", "import", str(tmp_path / "new.db"), str(tmp_path / "some"), "--partial"]) in (0, 1)


def test_stores_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "verify", "tree", "export"):
        assert main(["log", command, str(tmp_path / "none")]) == 1
        assert "there is no" in capsys.readouterr().err
    assert main(["log", "import", str(tmp_path / "x.db"), str(tmp_path / "none")]) == 1
    for wrong in (["log"], ["log", "ls"], ["log", "ls", "x", "--limit", "-1"], ["log", "tree", "x", "--svg", "--dot"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
