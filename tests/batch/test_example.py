"""The demo runs, with a tiny model: what it says is nonsense."""

from __future__ import annotations

import os
import subprocess
import sys

from tests import tiny
from tests.children import ROOT


def test_demo() -> None:
    # two processes compute on two cores at once: threads that spin would keep each other waiting
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "examples/run_batch.py", str(tiny.path("dense", vocab="spm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "64 of 64: yes" in done.stdout
