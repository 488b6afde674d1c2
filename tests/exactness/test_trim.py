"""Going back by removing tokens: where the answer is yes the sequence is exact, where it would not be the answer is no.

llama.cpp's own answer is yes as well where a sliding window has lost what the shorter sequence needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from llamastate import Context
from tests import raw, tiny
from tests.helpers import KINDS, context, nmse, tokens

PROBE = tokens(3, seed=77)


class Case(NamedTuple):
    """A text of ``n`` tokens in one context, decoded or restored."""

    kind: str
    n: int
    params: tuple[tuple[str, Any], ...] = ()
    restored: bool = False

    @property
    def memory_kind(self) -> str:
        return tiny.MODELS[self.kind].kind

    def context(self, n: int | None = None) -> Context:
        """The text, or its first ``n`` tokens, in decodes of the same size."""
        ctx = context(self.kind, n_ctx=1024, **dict(self.params))
        if n != 0:
            ctx.prefill(tokens(self.n, seed=5)[:n], chunk=16)
        if self.restored and n is None:
            blob = ctx.state_seq_get_data(0)
            ctx.clear()
            ctx.state_seq_set_data(blob, 0)
        return ctx


CASES = [
    Case(kind, n, params, restored)
    for kind in KINDS
    for n, params in (
        (20, ()),
        (48, ()),
        (100, ()),
        (100, (("flash_attn", "off"),)),
        (100, (("swa_full", True),)),
        (500, (("n_ubatch", 16),)),  # the window's cells have been used again
        (100, (("kv_unified", False), ("n_seq_max", 2))),
    )
    for restored in (False, True)
    # What is about windows is asked of windows only.
    if tiny.MODELS[kind].kind == "iswa" or (n == 100 and "swa_full" not in dict(params))
]


def name(case: Case) -> str:
    settings = "".join(f"-{key}={value}" for key, value in case.params)
    return f"{case.kind}-{case.n}{settings}{'-restored' if case.restored else ''}"


def probe(ctx: Context) -> npt.NDArray[np.float32]:
    """Logits after each of a few more tokens."""
    ctx.decode(PROBE, logits="all")
    return np.array([ctx.logits(i) for i in range(len(PROBE))])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_yes_is_exact_and_no_changes_nothing(case: Case):
    n = case.n
    points = {0, 1, 2, n // 2, n - 48, n - 33, n - 32, n - 31, n - 17, n - 3, n - 2, n - 1, n}
    answers = {}
    with case.context() as ctx:
        whole = ctx.state_get_data()
        for point in sorted(p for p in points if 0 <= p <= n):
            ctx.state_set_data(whole)
            if case.restored:  # the state of the whole context would bring back more than was restored
                blob = ctx.state_seq_get_data(0)
                ctx.state_seq_set_data(blob, 0)
            before = ctx.state_get_data()
            answers[point] = ctx.seq_rm(0, point, -1)
            with case.context(point) as scratch:
                expected = probe(scratch)
            if answers[point]:
                assert ctx.seq_pos_max(0) == point - 1
                assert nmse(probe(ctx), expected) <= 1e-5, point
            else:
                np.testing.assert_array_equal(ctx.state_get_data(), before)
                if raw.seq_rm(ctx, 0, point, -1):  # no needless no: llama.cpp's yes is wrong here
                    assert nmse(probe(ctx), expected) > 1e-5, point
    assert answers[0]
    assert answers[n]
    undone = {point for point, answer in answers.items() if answer} - {0, n}
    if case.memory_kind == "attention":
        assert undone == set(answers) - {0, n}
    elif case.memory_kind == "iswa":
        # One token can always be taken back; everything, as long as the window holds all there ever was.
        assert n - 1 in undone
        assert (1 in undone) == (n == 20 or (not case.restored and n < 200))
    else:
        assert not undone


@pytest.mark.parametrize("kind", KINDS)
def test_removing_the_middle(kind: str):
    """There is no text that would give what is left. Attention rows are removed as llama.cpp does; nothing else is."""
    with context(kind) as ctx, context(kind) as twin:
        for each in (ctx, twin):
            each.prefill(tokens(60))
        before = ctx.state_get_data()
        answers = [ctx.seq_rm(0, 20, 30), ctx.seq_rm(0, -1, 5)]
        if tiny.MODELS[kind].kind in ("attention", "iswa"):
            assert answers == [True, True]
            assert raw.seq_rm(twin, 0, 20, 30)
            assert raw.seq_rm(twin, 0, -1, 5)
            assert ctx.state_get_size() < len(before)
            np.testing.assert_array_equal(ctx.state_get_data(), twin.state_get_data())
        else:
            assert answers == [False, False]
            np.testing.assert_array_equal(ctx.state_get_data(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", [(60, -1), (60, 80), (20, 20), (30, 20), (100, 5), (0, 0), (-1, 0)])
def test_removing_nothing(kind: str, span: tuple[int, int]):
    with context(kind) as ctx:
        ctx.prefill(tokens(60))
        logits, before = ctx.logits(), ctx.state_get_data()
        assert ctx.seq_rm(0, *span)
        np.testing.assert_array_equal(ctx.state_get_data(), before)
        np.testing.assert_array_equal(ctx.logits(), logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", [(), (-1, -1), (0, -1), (-5, 60), (0, 1000)])
def test_removing_everything(kind: str, span: tuple[int, ...]):
    with context(kind, n_seq_max=2) as ctx, context(kind, n_seq_max=2) as fresh:
        ctx.prefill(tokens(60), seq_id=0)
        ctx.prefill(tokens(50), seq_id=1)
        other = ctx.state_seq_get_data(1)
        assert ctx.seq_rm(0, *span)
        assert (ctx.seq_pos_min(0), ctx.seq_pos_max(0)) == (-1, -1)
        np.testing.assert_array_equal(ctx.state_seq_get_data(0), fresh.state_seq_get_data(0))
        np.testing.assert_array_equal(ctx.state_seq_get_data(1), other)
        assert nmse(probe(ctx), probe(fresh)) <= 1e-5
