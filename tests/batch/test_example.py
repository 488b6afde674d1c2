"""The demo runs, with a tiny model: what it says is nonsense."""

from __future__ import annotations

import subprocess
import sys

from tests import tiny
from tests.children import ROOT


def test_demo() -> None:
    command = [sys.executable, "examples/run_batch.py", str(tiny.path("dense", vocab="spm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "72 of 72: yes" in done.stdout
