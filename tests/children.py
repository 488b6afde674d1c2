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


#: Forks a worker for each line it reads, and ends it after so many seconds: to begin anew would take far longer.
_FORKING = """
import os, sys, time

def main(work):
    for line in sys.stdin:
        seconds, argument = line.rstrip().split(" ", 1)
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                work(argument, lambda: os.write(writer, b"!"))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os.close(writer)
        ready = os.read(reader, 1)
        time.sleep(float(seconds))
        os.kill(pid, 9)
        status = os.waitpid(pid, 0)[1]
        os.close(reader)
        print("killed" if ready and os.WIFSIGNALED(status) else "failed", flush=True)

"""


class Victims:
    """Processes that are killed while they work.

    Parameters
    ----------
    code : str
        Prepares what all of them need, and defines ``work(argument, ready)``, which calls ``ready()`` and then works on
        without end.
    """

    def __init__(self, code: str) -> None:
        self._process = start(f"{_FORKING}{code}\nmain(work)")

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate(timeout=60)

    def kill(self, argument: object, seconds: float) -> None:
        """Let one work for so long after it is ready, and end it as ``kill -9`` does."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{seconds} {argument}\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer == "killed\n", answer or self._process.communicate()[1]
