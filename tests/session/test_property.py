"""Random lives of two sessions in one context, compared after every step with decoding from scratch."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from llamastate import Snapshot
from llamastate.errors import HistoryError
from llamastate.session import Session
from tests.helpers import KINDS, context, nmse, tokens

#: Runs of each kind of memory; of 20 steps each.
RUNS = int(os.environ.get("LLAMASTATE_PROPERTY_RUNS", "30"))
CELLS = 1024
BOTH = st.integers(0, 1)


class Lives(RuleBasedStateMachine):
    """What sessions should do, kept as plain lists: the tokens of each, and what undo took back."""

    kind = "dense"

    def make_store(self) -> Any:
        """What sessions may take prefixes from."""

    @initialize(unified=st.booleans(), every=st.sampled_from([0, 16, 48]), budget=st.sampled_from([2, 32]))
    def begin(self, unified: bool, every: int, budget: int) -> None:
        cells = CELLS if unified else 2 * CELLS
        self.settings: dict[str, Any] = {"n_ctx": cells, "n_seq_max": 2, "kv_unified": unified}
        self.ctx = context(self.kind, n_batch=64, **self.settings)
        self.fresh = context(self.kind, n_ctx=CELLS)
        options: dict[str, Any] = {"checkpoint_every": every, "max_checkpoints": budget, "store": self.make_store()}
        self.sessions = [Session(self.ctx, seq, **options) for seq in (0, 1)]
        self.options = options
        self.expected: list[list[int]] = [[], []]
        self.points: list[list[int]] = [[], []]
        self.undone: list[list[list[int]]] = [[], []]

        self.folder = tempfile.TemporaryDirectory(prefix="lives-")
        #: Snapshots, files, and what a session that comes from one has to be: tokens and checkpoints.
        self.kept: list[tuple[Snapshot | Path, list[int], list[int]]] = []

    def teardown(self) -> None:
        if hasattr(self, "ctx"):
            self.ctx.close()
            self.fresh.close()
            self.folder.cleanup()

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
        self.turn_into(which, wanted)

    def turn_into(self, which: int, wanted: list[int]) -> None:
        pairs = zip(self.expected[which], wanted, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        result = self.sessions[which].sync(wanted)
        assert result.reused + result.decoded == len(wanted)
        assert result.reused == max(shared, result.loaded)
        assert result.replayed <= result.reused - result.loaded
        # checkpoints past what the two have in common are of other tokens
        self._becomes(which, self.expected[which][:shared])
        self.expected[which] = wanted

    @rule(which=BOTH)
    def branch(self, which: int) -> None:
        other = 1 - which
        self.ctx.seq_rm(other)
        self.sessions[other] = self.sessions[which].branch(other)
        self.expected[other] = list(self.expected[which])
        self.points[other] = list(self.points[which])
        self.undone[other] = []

    @rule(which=BOTH, on_disk=st.booleans())
    def keep(self, which: int, on_disk: bool) -> None:
        session = self.sessions[which]
        what: Snapshot | Path
        if on_disk:
            what = Path(self.folder.name, f"{len(self.kept)}.llsnap")
            assert session.save(what, metadata={"n": len(self.kept)}) == what.stat().st_size
        else:
            what = session.snapshot()
        # what undo has taken back is not kept, and neither are checkpoints of it
        points = [p for p in self.points[which] if p <= session.n_past]
        self.kept.append((what, list(self.expected[which]), points))

    @precondition(lambda self: self.kept)
    @rule(which=BOTH, index=st.integers(0, 9), here=st.booleans())
    def bring_back(self, which: int, index: int, here: bool) -> None:
        """Into the session that is there, or a new one in its sequence."""
        what, wanted, points = self.kept[index % len(self.kept)]
        if isinstance(what, Path):
            self.sessions[which] = Session.load(self.ctx, what, seq_id=which, **self.options)
        elif here:
            self.sessions[which].restore(what)
        else:
            self.sessions[which] = Session.from_snapshot(self.ctx, what, seq_id=which, **self.options)
        self.expected[which], self.points[which], self.undone[which] = list(wanted), list(points), []

    @rule()
    def restart(self) -> None:
        """Both go into files, and come back in another context."""
        paths = [Path(self.folder.name, f"restart-{i}") for i in range(2)]
        for i, (session, path) in enumerate(zip(self.sessions, paths, strict=True)):
            session.save(path)
            self.points[i] = [p for p in self.points[i] if p <= session.n_past]
        self.ctx.close()
        self.ctx = context(self.kind, n_batch=64, **self.settings)
        self.sessions = [Session.load(self.ctx, path, seq_id=i, **self.options) for i, path in enumerate(paths)]
        self.undone = [[], []]

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
                assert_agree(session.logits, self.fresh.logits())


def assert_agree(found: np.ndarray, expected: np.ndarray) -> None:
    """As :func:`assert_same_logits`, but two tokens that the noise of cell order cannot tell apart are one.

    Thousands of steps meet such a tie sooner or later.
    """
    assert nmse(found, expected) <= 1e-5
    assert expected[found.argmax()] >= expected.max() - 10**-2.5 * np.sqrt((expected.astype(np.float64) ** 2).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_are_exact(kind: str) -> None:
    """Whatever two sessions go through, their next logits are those of a context that only decoded their tokens."""
    live(type(f"Lives_{kind}", (Lives,), {"kind": kind}), RUNS)


def live(machine: type[Lives], runs: int) -> None:
    """So many runs of 20 steps, the same every time."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
