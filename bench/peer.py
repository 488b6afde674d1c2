"""The bench's end of a program in ``peers/``: a process, mostly of another environment, told one line at a time."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["ROOT", "Peer", "python_of"]

ROOT = Path(__file__).resolve().parent.parent


def python_of(variable: str, venv: str) -> str | None:
    """The interpreter that an environment variable names, or that of an environment in the checkout; None without."""
    python = os.environ.get(variable) or str(ROOT / venv / "bin" / "python")
    return python if Path(python).exists() else None


class Peer:
    """A process that does what it is told, and answers with what it took.

    Parameters
    ----------
    python : str
    script : str
        Its name in ``peers/``.
    task : object
        The first line; its answer is :attr:`facts`.
    """

    def __init__(self, python: str, script: str, task: object) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [python, str(ROOT / "bench" / "peers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.facts = self.ask(task)

    def ask(self, request: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._said.seek(0)
            raise RuntimeError(f"the other side ended with status {status}: {self._said.read()[-2000:]}")
        return dict(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
