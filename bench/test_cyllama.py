"""Against cyllama, which brings a llama.cpp of its own and so needs a process, and an environment, of its own.

``make bench-peers`` makes the environment. ``LLAMASTATE_CYLLAMA_PYTHON`` names another interpreter that has it.
"""

from __future__ import annotations

from functools import partial

import pytest

from bench.conftest import CORES
from bench.peer import Peer, python_of
from bench.timing import pairs, settle
from tests import models

CLAIM = "state_seq_get_data_into against cyllama's get_state_seq_data"


class Cyllama(Peer):
    """A process that takes and puts the same state."""

    def __init__(self, python: str, tokens: list[int]) -> None:
        task = {"model": str(models.smollm2()), "tokens": tokens, "n_ctx": 4096, "n_threads": CORES}
        super().__init__(python, "cyllama_peer.py", task)

    def seconds(self, operation: str) -> float:
        """Seconds of one call after untimed ones, as for the other side."""
        settle(partial(self.ask, operation))
        return float(self.ask(operation)["seconds"])


@pytest.fixture(scope="module")
def peer(tokens):
    python = python_of("LLAMASTATE_CYLLAMA_PYTHON", ".venv-cyllama")
    if python is None:
        yield None
        return
    with Cyllama(python, tokens.tolist()) as peer:
        yield peer


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
