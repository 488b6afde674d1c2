"""The command line, in processes of its own and in this one."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from llamastate import Session, SessionManager
from llamastate.cli import main
from tests import raw
from tests.children import ROOT
from tests.helpers import context, tokens
from tests.test_sessionfiles import packed

IDS = tokens(40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with context("iswa") as ctx:
        manager = SessionManager(tmp_path / "sessions")
        session = manager.create("chat", ctx, system_prompt=IDS, metadata={"user": "x"})
        session.checkpoint("turn 1")
        session.feed([1])
        manager.save("chat", session)
        session.rollback(40)
        for form in ("ggsq", "ggsq-packed", "ggsn"):
            session.export_file(tmp_path / form, format=form)
        raw.seq_save_file(ctx, tmp_path / "media", 0, packed(2, [1, -1], media=[b"image"]))
        manager.close()
    return tmp_path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamastate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_help() -> None:
    for command in ((), ("inspect",), ("verify",), ("sessions",)):
        done = run(*command, "--help")
        assert done.returncode == 0
        assert "exit status" in done.stdout
    assert run().returncode == 2
    assert run("inspect").returncode == 2


def test_the_installed_command(folder: Path, tmp_path: Path) -> None:
    """What ``pip install`` puts beside python, from any folder."""
    script = Path(sysconfig.get_path("scripts"), "llamastate")
    path = folder / "sessions" / "chat.llsnap"

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(script), *map(str, arguments)]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    for arguments in (("inspect", path), ("verify", path), ("sessions", folder / "sessions"), ("inspect", folder)):
        done, same = command(*arguments), run(*arguments)
        assert done.returncode == same.returncode == int(arguments[1] == folder)
        if arguments[0] != "sessions":  # it tells ages
            assert (done.stdout, done.stderr) == (same.stdout, same.stderr)
    assert json.loads(command("sessions", "--json", folder / "sessions").stdout)[0]["n_tokens"] == 41
    assert command("inspect", "--json", path).stdout.startswith("{")


def test_inspect_snapshot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(folder / "sessions" / "chat.llsnap")
    assert main(["inspect", "--json", path]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["n_tokens"]) == ("llsnap", 41)
    assert facts["fingerprint"]["architecture"] == "gemma3"
    assert [(p["n_tokens"], p["label"]) for p in facts["checkpoints"]] == [(40, "turn 1")]
    assert facts["metadata"]["user"] == "x"
    assert {"tokens", "state", "checkpoint 0: state"} <= {s["name"] for s in facts["sections"]}
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    assert "turn 1" in text
    assert "gemma3" in text


@pytest.mark.parametrize(
    ("name", "form", "n_tokens", "media"),
    [("ggsq", "ggsq", 40, 0), ("ggsq-packed", "ggsq", 40, 0), ("ggsn", "ggsn", 40, 0), ("media", "ggsq", 2, 1)],
)
def test_inspect_native(
    name: str, form: str, n_tokens: int, media: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--json", str(folder / name)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["n_tokens"], facts["media"]) == (form, n_tokens, media)
    assert facts["packed"] == (name in ("ggsq-packed", "media"))
    assert facts["layout"] == ["base", "window"]
    assert facts["architecture"] == ("gemma3" if form == "ggsn" else None)
    assert main(["inspect", str(folder / name)]) == 0
    assert form in capsys.readouterr().out


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [
        str(folder / "sessions" / "chat.llsnap"),
        *(str(folder / n) for n in ("ggsq", "ggsq-packed", "ggsn", "media")),
    ]
    assert main(["verify", *good]) == 0
    assert capsys.readouterr().out.count(": ok") == len(good)
    main(["inspect", "--json", good[0]])
    whole = Path(good[0]).read_bytes()
    for section in json.loads(capsys.readouterr().out)["sections"]:
        damaged = bytearray(whole)
        damaged[section["offset"]] ^= 1
        (folder / "damaged").write_bytes(damaged)
        assert main(["verify", good[0], str(folder / "damaged"), good[1]]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [": ok" in line for line in lines] == [True, False, True]
        assert f"FAILED [{section['name']}]" in lines[1]


@pytest.mark.parametrize("name", ["ggsq", "ggsn"])
def test_verify_damaged_native(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (folder / name).read_bytes()
    for end in (0, 3, 11, 100, 172, *((len(data) - 1, 180) if name == "ggsq" else (174,))):
        (folder / "cut").write_bytes(data[:end])
        assert main(["verify", str(folder / "cut")]) == 1, end
        assert "FAILED" in capsys.readouterr().out


def test_errors_are_sentences(folder: Path) -> None:
    (folder / "text").write_text("hello")
    (folder / "bad\nname").write_bytes(b"")
    for arguments in (
        ("inspect", folder / "none"),
        ("inspect", folder / "text"),
        ("inspect", folder),
        ("sessions", folder / "none"),
        ("sessions", folder / "text"),
        ("inspect", folder / "bad\nname"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("llamastate: ")
        assert "Traceback" not in done.stderr


def test_sessions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sessions = folder / "sessions"
    before = sorted(p.name for p in sessions.iterdir())
    assert main(["sessions", str(sessions)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "TOKENS", "SIZE", "CHECKPOINTS", "AGE", "MODEL"]
    assert row.split()[:2] == ["chat", "41"]
    (sessions / "x\udcff.llsnap").write_bytes(b"no snapshot")
    assert main(["sessions", str(sessions)]) == 1
    assert "damaged" in capsys.readouterr().out
    assert main(["sessions", "--json", str(sessions)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [info["error"] is None for info in found] == [True, False]
    assert sorted(p.name for p in sessions.iterdir()) == sorted([*before, "x\udcff.llsnap"])


def test_a_reader_that_leaves(folder: Path) -> None:
    """``llamastate inspect ... | head -c 1``."""
    command = f"{sys.executable} -m llamastate inspect --json {folder}/sessions/chat.llsnap"
    with subprocess.Popen(
        command.split(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_a_file_of_nothing(folder: Path) -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        assert session.export_file(folder / "empty") == 20
    assert main(["inspect", str(folder / "empty")]) == 0
    assert np.fromfile(folder / "empty", np.uint32)[2] == 0
