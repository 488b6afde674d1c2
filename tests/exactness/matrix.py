"""The settings that decide how a state lies in memory, and contexts prepared in each of them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llamastate import Context
from tests import helpers, tiny

#: Tokens that every test here goes on for.
STEPS = 16
#: Longer than the sliding windows (32) and no multiple of anything.
PROMPT = 90
CHUNK = 40


class Settings(NamedTuple):
    """One point of the matrix."""

    kind: str
    flash_attn: str = "on"
    unified: bool = True
    n_seq_max: int = 1
    cache_type: str = "f16"

    @property
    def seq_id(self) -> int:
        """The sequence that is looked at: one in the middle, so that there are cells on both sides of its own."""
        return self.n_seq_max // 2

    @property
    def memory_kind(self) -> str:
        return tiny.MODELS[self.kind].kind

    @property
    def bit_equal(self) -> bool:
        """Whether a restored sequence lies in the cells in which it lay before, so that no bit may differ."""
        if self.memory_kind == "recurrent":
            return True
        return "iswa" not in self.memory_kind and (self.n_seq_max == 1 or not self.unified)

    def context(self, **params: Any) -> Context:
        """A fresh context with these settings."""
        return helpers.context(
            self.kind,
            flash_attn=self.flash_attn,
            kv_unified=self.unified,
            n_seq_max=self.n_seq_max,
            type_k=self.cache_type,
            type_v=self.cache_type,
            **params,
        )

    def filled(self, **params: Any) -> tuple[Context, int]:
        """A context whose sequences differ in text and length, and the token that the one looked at goes on with."""
        ctx = self.context(**params)
        for other in range(self.n_seq_max):
            if other != self.seq_id:
                ctx.prefill(helpers.tokens(20 + other, seed=other), seq_id=other)
        ctx.prefill(helpers.tokens(PROMPT, seed=9), seq_id=self.seq_id, chunk=CHUNK)
        return ctx, int(ctx.logits().argmax())


def _matrix() -> list[Settings]:
    points = itertools.product(helpers.KINDS, ("on", "off"), (True, False), (1, 4), ("f16", "q8_0"))
    return [
        Settings(kind, flash, unified, n_seq_max, cache_type)
        for kind, flash, unified, n_seq_max, cache_type in points
        # A quantised V needs flash attention; a recurrent state has no KV types.
        if cache_type == "f16" or (flash == "on" and tiny.MODELS[kind].kind != "recurrent")
    ]


MATRIX = _matrix()
#: One point for each kind of memory, with several sequences in one pool: the hardest of the usual settings.
USUAL = [Settings(kind, n_seq_max=4) for kind in helpers.KINDS]


def name(point: Settings) -> str:
    """The id of a test: ``iswa-fa-unified-4-f16``."""
    flash = "fa" if point.flash_attn == "on" else "nofa"
    pool = "unified" if point.unified else "streams"
    return f"{point.kind}-{flash}-{pool}-{point.n_seq_max}-{point.cache_type}"


def assert_continues(
    point: Settings, found: tuple[list[int], npt.NDArray[Any]], expected: tuple[list[int], npt.NDArray[Any]]
) -> None:
    """The same tokens and the same logits: to the bit where the cells lie alike, else but for the noise of order."""
    assert found[0] == expected[0]
    assert np.isfinite(expected[1]).all()
    if point.bit_equal:
        np.testing.assert_array_equal(found[1], expected[1])
    else:
        helpers.assert_same_logits(found[1], expected[1])
