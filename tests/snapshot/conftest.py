from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamastate import Context
from tests.helpers import context, tokens

N = 90


@pytest.fixture
def filled() -> Iterator[Context]:
    """A dense context of two sequences; sequence 0 holds 90 tokens."""
    with context("dense", n_seq_max=2) as ctx:
        ctx.prefill(tokens(N, seed=9))
        yield ctx
