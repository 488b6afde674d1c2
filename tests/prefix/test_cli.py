"""``llamastate store``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llamastate.cli import main
from llamastate.prefix import PrefixStore
from llamastate.prefix.disk import DiskTier
from tests.helpers import context, tokens
from tests.prefix.disks import file_of, flip, sound
from tests.prefix.entries import chain

IDS = tokens(100)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window and one of full attention; two prompts that begin alike."""
    path = tmp_path_factory.mktemp("store")
    for kind in ("dense", "iswa"):
        with context(kind, n_seq_max=2) as ctx, PrefixStore(path, block_tokens=16) as store:
            for seq, ids in enumerate((IDS, np.r_[IDS[:64], tokens(32, seed=1)])):
                ctx.decode(ids, seq_id=seq)
                store.put(ctx, seq, ids)
            store.pin(IDS[:32], ctx=ctx)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main(["store", *map(str, arguments)]) == status
    return capsys.readouterr().out


def test_ls(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uses = json.loads(run(capsys, "ls", filled, "--json"))
    assert [(u["kind"], u["block_tokens"], u["blocks"], u["anchors"]) for u in uses] == [
        ("attention", 16, 8, 0),
        ("iswa", 16, 8, 2),
    ]
    assert [(u["tokens"], u["longest"]) for u in uses] == [(8 * 16, 96), (8 * 16, 100)]
    assert uses[1]["fingerprint"]["architecture"] == "gemma3"
    assert all(u["created"] < u["first_used"] <= u["last_used"] for u in uses)
    lines = run(capsys, "ls", filled).splitlines()
    assert lines[0].split()[0] == "ROOT"
    assert [line.split()[0] for line in lines[1:]] == [u["root"][:12] for u in uses]
    assert "gemma3 f16/f16" in lines[2]


def test_entries(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = json.loads(run(capsys, "ls", filled, "--entries", "--json"))
    assert len(every) == 18
    root = every[-1]["root"]
    some = json.loads(run(capsys, "ls", filled, "--entries", "--root", root[:8], "--json"))
    assert {row["root"] for row in some} == {root}
    assert {(row["kind"], row["start"], row["tail"]) for row in some if row["kind"] == "anchor"} == {
        ("anchor", 96, 4),
        ("anchor", 96, 0),
    }
    names = {path.stem for path in filled.glob("blocks/*/*.llblk")}
    assert {row["key"] for row in every} == names
    assert sum(row["nbytes"] for row in every) == sum(p.stat().st_size for p in filled.glob("blocks/*/*.llblk"))
    text = run(capsys, "ls", filled, "--entries", "--limit", 3)
    assert text.count("\n") == 4
    assert main(["store", "ls", str(filled), "--root", "zz"]) == 1
    assert "'zz'" in capsys.readouterr().err


def test_stats(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, "stats", filled, "--json"))
    sizes = [p.stat().st_size for p in filled.glob("blocks/*/*.llblk")]
    assert (facts["models"], facts["entries"], facts["blocks"], facts["anchors"]) == (2, 18, 16, 2)
    assert (facts["bytes"], facts["tokens"]) == (sum(sizes), 256)
    assert 0 < facts["pinned_bytes"] < facts["bytes"]
    assert 0 < facts["anchor_bytes"] < facts["bytes"]
    text = run(capsys, "stats", filled)
    assert f"({facts['bytes']} bytes)" in text


@pytest.mark.parametrize("drop", [False, True])
def test_verify(drop: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = DiskTier(tmp_path)
    entries = chain(5)
    for entry in entries:
        tier.put(entry)
    assert "5 entries, none damaged" in run(capsys, "verify", tmp_path)
    flip(file_of(tier, entries[2]))
    options = ["--drop"] if drop else []
    facts = json.loads(run(capsys, "verify", tmp_path, "--json", *options, status=1))
    assert [row["key"] for row in facts["damaged"]] == [entries[2].key.hex()]
    assert "checksum" in facts["damaged"][0]["reason"]
    assert file_of(tier, entries[2]).exists() is not drop
    text = run(capsys, "verify", tmp_path, status=0 if drop else 1)
    assert ("FAILED" in text) is not drop
    tier.close()


def test_gc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = DiskTier(tmp_path)
    entries = chain(20)
    for entry in entries:
        tier.put(entry)
    tier.pin(b"name", 8, [entries[0].key])
    file_of(tier, entries[19]).unlink()
    tier._index.remove([entries[18].key])
    facts = json.loads(run(capsys, "gc", tmp_path, "--json"))
    assert (facts["adopted"], facts["lost"], facts["evicted_bytes"]) == (1, 1, 0)
    assert facts["bytes"] == 19 * entries[0].nbytes
    tier.flush()
    assert "evicted" in run(capsys, "gc", tmp_path, "--to", "10kB")
    left = 10_000 // entries[0].nbytes
    assert 2 < left < 18
    assert tier.known([e.key for e in entries]) == {e.key for e in entries[:left]}  # the ends of chains go first
    assert "0 files found again" in run(capsys, "gc", tmp_path, "--to", 0)
    assert tier.known([e.key for e in entries]) == {entries[0].key}
    sound(tier)
    tier.close()


def test_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        for command in ("ls", "stats", "verify", "gc"):
            assert main(["store", command, str(path)]) == 1
            assert "not the folder of a prefix store" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    (tmp_path / "store.json").write_text('{"version": 2}')
    assert main(["store", "gc", str(tmp_path)]) == 1
    assert "version 2" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["store.json"]


@pytest.mark.parametrize("text", ["", "x", "-1", "1 KB", "5 PB", "nan"])
def test_sizes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["store", "gc", str(tmp_path), "--to", text])
    assert caught.value.code == 2
    capsys.readouterr()


def test_sizes_in_words() -> None:
    from llamastate.clitext import bytes_of

    assert [bytes_of(t) for t in ("0", "20GB", "1.5 MB", "2KiB", "3Gi", "7k")] == [
        0, 20 * 10**9, 1_500_000, 2048, 3 << 30, 7000,
    ]  # fmt: skip
