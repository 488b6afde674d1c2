"""The examples run, with a tiny model: what it says is nonsense."""

from __future__ import annotations

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
        ("log_resume", "the same token follows: True"),
    ],
)
def test_example(example: str, words: str, kind: str) -> None:
    command = [sys.executable, f"examples/{example}.py", str(tiny.path(kind, vocab="spm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
