"""Random lives of two sessions in one context, compared after every step with decoding from scratch."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from llamastate.errors import HistoryError
from llamastate.session import Session
from tests.helpers import KINDS, assert_same_logits, context, tokens

#: Runs of each kind of memory; of 20 steps each.
RUNS = int(os.environ.get("LLAMASTATE_PROPERTY_RUNS", "30"))
CELLS = 1024
BOTH = st.integers(0, 1)


class Lives(RuleBasedStateMachine):
    """What sessions should do, kept as plain lists: the tokens of each, and what undo took back."""

    kind = "dense"

    @initialize(unified=st.booleans(), every=st.sampled_from([0, 16, 48]), budget=st.sampled_from([2, 32]))
    def begin(self, unified: bool, every: int, budget: int) -> None:
        cells = CELLS if unified else 2 * CELLS
        self.ctx = context(self.kind, n_ctx=cells, n_seq_max=2, kv_unified=unified, n_batch=64)
        self.fresh = context(self.kind, n_ctx=CELLS)
        options: dict[str, Any] = {"checkpoint_every": every, "max_checkpoints": budget}
        self.sessions = [Session(self.ctx, seq, **options) for seq in (0, 1)]
        self.options = options
        self.expected: list[list[int]] = [[], []]
        self.points: list[list[int]] = [[], []]
        self.undone: list[list[list[int]]] = [[], []]

    def teardown(self) -> None:
        if hasattr(self, "ctx"):
            self.ctx.close()
            self.fresh.close()

    # --- steps --------------------------------------------------------------------------------------------------------

    @rule(which=BOTH, n=st.integers(1, 50), seed=st.integers(0, 99))
    def feed(self, which: int, n: int, seed: int) -> None:
        new = tokens(n, seed).tolist()
        assert self.sessions[which].feed(new) == n
        self._becomes(which, self.expected[which] + new)

    @precondition(lambda self: any(self.expected))
    @rule(which=BOTH, n=st.integers(0, 8))
    def generate(self, which: int, n: int) -> None:
        if self.expected[which]:
            made = self.sessions[which].generate(n)
            assert len(made.tokens) == n
            if n:
                self._becomes(which, self.expected[which] + list(made.tokens))

    @rule(which=BOTH, full=st.booleans())
    def checkpoint(self, which: int, full: bool) -> None:
        point = self.sessions[which].checkpoint(full=full)
        assert point.n_tokens == len(self.expected[which])
        self.points[which].append(point.n_tokens)

    @rule(which=BOTH, n=st.integers(1, 2))
    def undo(self, which: int, n: int) -> None:
        now = self.expected[which]
        steps = sorted({p for p in self.points[which] if p < len(now)}, reverse=True)
        if n > len(steps):
            with pytest.raises(HistoryError):
                self.sessions[which].undo(n)
            return
        self.sessions[which].undo(n)
        self.undone[which] += [now, *(now[:p] for p in steps[: n - 1])]
        self.expected[which] = now[: steps[n - 1]]

    @rule(which=BOTH)
    def redo(self, which: int) -> None:
        if not self.undone[which]:
            with pytest.raises(HistoryError):
                self.sessions[which].redo()
            return
        self.sessions[which].redo()
        self.expected[which] = self.undone[which].pop()

    @rule(which=BOTH, share=st.floats(0, 1))
    def rollback(self, which: int, share: float) -> None:
        n = round(share * len(self.expected[which]))
        self.sessions[which].rollback(n)
        self._becomes(which, self.expected[which][:n])

    @rule(which=BOTH, share=st.floats(0, 1), n=st.integers(0, 30), seed=st.integers(100, 199))
    def sync(self, which: int, share: float, n: int, seed: int) -> None:
        kept = round(share * len(self.expected[which]))
        wanted = self.expected[which][:kept] + tokens(n, seed).tolist()
        result = self.sessions[which].sync(wanted)
        assert result.reused + result.decoded == len(wanted)
        # checkpoints past what the two have in common are of other tokens
        self._becomes(which, self.expected[which][: result.reused])
        self.expected[which] = wanted

    @rule(which=BOTH)
    def branch(self, which: int) -> None:
        other = 1 - which
        self.ctx.seq_rm(other)
        self.sessions[other] = self.sessions[which].branch(other)
        self.expected[other] = list(self.expected[which])
        self.points[other] = list(self.points[which])
        self.undone[other] = []

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _becomes(self, which: int, wanted: list[int]) -> None:
        self.expected[which] = wanted
        self.points[which] = [p for p in self.points[which] if p <= len(wanted)]
        self.undone[which] = []

    def check_invariants(self, settings: Any, output: Any, runtimes: Any) -> None:  # after every step
        super().check_invariants(settings, output, runtimes)
        for session, wanted in zip(getattr(self, "sessions", ()), getattr(self, "expected", ()), strict=True):
            assert session.tokens.tolist() == wanted
            assert self.ctx.seq_pos_max(session.seq_id) == len(wanted) - 1
            if wanted:
                self.fresh.clear()
                self.fresh.prefill(wanted, chunk=64)
                assert_same_logits(session.logits, self.fresh.logits())


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_are_exact(kind: str) -> None:
    """Whatever two sessions go through, their next logits are those of a context that only decoded their tokens."""
    machine = type(f"Lives_{kind}", (Lives,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
