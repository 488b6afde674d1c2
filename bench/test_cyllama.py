"""Against cyllama, which brings a llama.cpp of its own and so needs a process, and an environment, of its own.

``make bench-peers`` makes the environment. ``LLAMASTATE_CYLLAMA_PYTHON`` names another interpreter that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from bench.conftest import CORES
from bench.timing import pairs, settle
from tests import models

ROOT = Path(__file__).resolve().parent.parent
CLAIM = "state_seq_get_data_into against cyllama's get_state_seq_data"


class Peer:
    """A process that does what it is told, one line at a time, and answers with what it took."""

    def __init__(self, python: str, tokens: list[int]) -> None:
        self._process = subprocess.Popen(
            [python, str(ROOT / "bench" / "peers" / "cyllama_peer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.facts = self.ask({"model": str(models.smollm2()), "tokens": tokens, "n_ctx": 4096, "n_threads": CORES})

    def ask(self, request: object) -> dict[str, object]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"cyllama's process ended with status {self._process.wait()}")
        return dict(json.loads(answer))

    def seconds(self, operation: str) -> float:
        """Seconds of one call after untimed ones, as for the other side."""
        settle(partial(self.ask, operation))
        return float(str(self.ask(operation)["seconds"]))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def peer(tokens):
    python = os.environ.get("LLAMASTATE_CYLLAMA_PYTHON") or str(ROOT / ".venv-cyllama" / "bin" / "python")
    if not Path(python).exists():
        yield None
        return
    peer = Peer(python, tokens.tolist())
    yield peer
    peer.close()


def test_get(benchmark, claim, ctx, blob, peer):
    if peer is None:
        claim(5, CLAIM, "not installed (make bench-peers)", None, 10, at_least=True)
        return
    if peer.facts["n_bytes"] != blob.nbytes:
        raise RuntimeError(f"cyllama's state has {peer.facts['n_bytes']} bytes, ours {blob.nbytes}: not the same work")
    take = partial(ctx.state_seq_get_data_into, blob.copy(), 0)
    result = pairs(benchmark, take, partial(peer.seconds, "get"), rounds=31, begin=partial(settle, take))
    claim(
        5,
        CLAIM,
        f"{1 / result.ratio:.1f} × faster (pairs {1 / result.pair_ratio:.1f}): "
        f"{1e3 * result.our_median:.2f} against {1e3 * result.other_median:.1f} ms (cyllama {peer.facts['version']})",
        1 / result.ratio,
        10,
        at_least=True,
    )


def test_set(benchmark, claim, ctx, blob, peer):
    if peer is None:
        return
    put = partial(ctx.state_seq_set_data, blob, 0)
    result = pairs(benchmark, put, partial(peer.seconds, "set"), rounds=31, begin=partial(settle, put))
    claim(
        22,
        "state_seq_set_data against cyllama's set_state_seq_data, which checks nothing",
        f"{1 / result.ratio:.2f} × faster: {1e3 * result.our_median:.2f} against {1e3 * result.other_median:.2f} ms",
    )
