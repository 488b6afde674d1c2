"""Running Python in processes of their own: for what would end this one, or could not be undone in it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python that can import the tests; threads of computation are inherited from ``tests.conftest``."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever that is."""
    with start(code, *arguments) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def limit_memory(n_bytes: int = 8 << 30) -> bool:
    """Let this process fail rather than the machine; whether that could be done.

    AddressSanitizer takes terabytes of addresses, whatever the memory: then there is no such limit.
    """
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        return False
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    return True
