"""The examples run, with a tiny model: what it says is nonsense."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import tiny
from tests.children import ROOT


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba"])
@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("undo_redo", "undo: 0 tokens decoded again"),
        ("shared_prompt", "3 branches"),
        ("revert", "0 tokens decoded again"),
        ("rag", "the answers are the same"),
    ],
)
def test_example(example: str, words: str, kind: str) -> None:
    assert words in run(example, kind)


def run(example: str, kind: str) -> str:
    command = [sys.executable, f"examples/{example}.py", str(tiny.path(kind, vocab="spm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_log_resume() -> None:
    """It dies, comes back with its state, is forked, and draws the tree."""
    said = run("log_resume", "jamba")
    assert "it ended with -9" in said
    reused, decoded = map(int, re.findall(r"back in .*: (\d+) tokens reused, (\d+) decoded", said)[0])
    (scratch,) = map(int, re.findall(r"without it in .*: (\d+) tokens decoded", said))
    assert reused + decoded == scratch
    assert decoded < reused
    assert "the same token follows: True" in said
    assert int(re.findall(r"forked after turn 1: (\d+) tokens reused", said)[0]) > 0
    assert re.search(r"^trip .*\n└─ another-trip .* forked at entry \d+$", said, re.MULTILINE)


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba"])
def test_llama_cpp_cache(kind: str) -> None:
    """What the first run has read the second restores."""
    first, second = run("llama_cpp_cache", kind).split("the second, which might be tomorrow")
    restored = [[int(n) for n in re.findall(r"(\d+) restored", part)] for part in (first, second)]
    assert restored[0][0] == 0
    assert restored[1][0] > 100
    assert re.findall(r"(\d+) bytes", first) == re.findall(r"(\d+) bytes", second) != []
