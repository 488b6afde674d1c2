"""A context with something to lose, a twin of it, and the question whether a refused call has left it alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llamastate import LlamaStateError
from tests.helpers import context, tokens


class Pair:
    """Two contexts that did the same. Sequence 0 and 1 hold something, the others nothing."""

    def __init__(self, kind: str, **params: Any) -> None:
        params.setdefault("n_seq_max", 4)
        self.ctx, self.twin = (context(kind, **params) for _ in range(2))
        for ctx in (self.ctx, self.twin):
            ctx.decode(tokens(40, seed=1), seq_id=0)
            if ctx.n_seq_max > 1:
                ctx.decode(tokens(9, seed=2), seq_id=1)

    def held(self) -> list[tuple[int, int, bytes]]:
        """What there is of every sequence."""
        ctx = self.ctx
        return [
            (ctx.seq_pos_min(seq), ctx.seq_pos_max(seq), ctx.state_seq_get_data(seq).tobytes())
            for seq in range(ctx.n_seq_max)
        ]

    @contextlib.contextmanager
    def refuses(self, error: type[LlamaStateError], **facts: Any) -> Iterator[list[LlamaStateError]]:
        """The block raises exactly that class, with these attributes among others, and changes nothing."""
        before = self.held()
        caught: list[LlamaStateError] = []
        with pytest.raises(LlamaStateError) as info:
            yield caught
        found = info.value
        caught.append(found)
        assert type(found) is error, f"{found!r} instead of {error.__name__}"
        assert {name: getattr(found, name) for name in facts} == facts
        assert self.held() == before, f"{found!r} changed the context"

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever the block raises, nothing has changed."""
        before = self.held()
        try:
            yield
        finally:
            assert self.held() == before

    def check_logits(self) -> None:
        """Every sequence goes on as the twin's does."""
        for seq in range(self.ctx.n_seq_max):
            rows = []
            for ctx in (self.ctx, self.twin):
                ctx.decode([7], seq_id=seq)
                rows.append(ctx.logits())
            assert np.array_equal(*rows), f"sequence {seq} goes on differently"

    def close(self) -> None:
        self.ctx.close()
        self.twin.close()


@contextlib.contextmanager
def pair(kind: str, **params: Any) -> Iterator[Pair]:
    """A pair whose contexts go on alike at the end of the block."""
    found = Pair(kind, **params)
    try:
        yield found
        found.check_logits()
    finally:
        found.close()
