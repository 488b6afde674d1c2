"""Sessions: what saving, loading, checkpoints and undo cost above what cannot be done without."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import raw
from bench.conftest import CORES, N_TOKENS
from bench.test_files import write_by_hand
from bench.timing import Pairs, pairs, seconds, stopwatch
from llamastate import Context, Model, SeqFlags, Session
from llamastate.history import Checkpoint
from tests import models, tiny

ROOT = Path(__file__).resolve().parent.parent

#: The tiny models are wider here than in the tests: else a raw call takes as long as calling it.
WIDE: dict[str, dict[str, int]] = {
    "iswa": {"n_layer": 12, "n_embd": 512, "n_head": 8, "n_head_kv": 8, "head_dim": 64, "n_ff": 512, "window": 256},
    "mamba": {"n_layer": 24, "n_embd": 512},
    "jamba": {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_head_kv": 4, "head_dim": 64, "n_ff": 512},
}


@pytest.fixture
def session(ctx: Context, tokens: Any) -> Session:
    """The conversation that sequence 0 holds."""
    session = Session(ctx, 0, tokens=tokens)
    _ = session.logits
    return session


def against(pairs: Pairs, unit: float = 1e3, name: str = "ms") -> str:
    """The figures of a row."""
    low, high = pairs.spread
    return (
        f"{pairs.ratio:.2f} × (pairs {pairs.pair_ratio:.2f}, {low:.2f}–{high:.2f}): "
        f"{unit * pairs.our_median:.3g} against {unit * pairs.other_median:.3g} {name}"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def test_save(benchmark, claim, session, folder):
    ours, by_hand = folder / "ours.llsnap", folder / "by-hand.bin"
    session.save(ours)
    data = ours.read_bytes()
    result = pairs(
        benchmark,
        lambda: session.save(ours),
        stopwatch(lambda: write_by_hand(by_hand, memoryview(data))),
        rounds=41,
    )
    assert len(data) == ours.stat().st_size
    claim(
        50,
        "Session.save: state, checksums, durable, against write + fsync + rename of as many bytes",
        against(result),
        result.ratio,
        1.15,
    )


def test_save_against_llama_cpp(benchmark, claim, ctx, session, tokens, folder):
    ours, theirs = folder / "ours.llsnap", folder / "theirs.ggsq"
    result = pairs(
        benchmark,
        lambda: session.save(ours),
        stopwatch(raw.save_file(ctx, theirs, 0, tokens)),
        rounds=41,
    )
    assert theirs.stat().st_size > ctx.state_seq_get_size(0)
    claim(
        51,
        "Session.save, durable, against llama_state_seq_save_file, which does not wait for the disk",
        against(result),
        result.ratio,
        1.0,
    )


def test_load(benchmark, claim, ctx, session, blob, folder):
    path = folder / "chat.llsnap"
    session.save(path)
    path.read_bytes()
    source, target = blob.copy(), blob.copy()
    result = pairs(
        benchmark,
        lambda: Session.load(ctx, path, seq_id=1),
        stopwatch(lambda: np.copyto(target, source)),
        rounds=101,
        warmup=5,
        begin=lambda: ctx.seq_rm(1),
    )
    ctx.seq_rm(1)
    claim(
        52,
        "Session.load, verified, page cache warm, against memcpy of as many bytes",
        against(result),
        result.ratio,
        2.0,
    )


def test_resume_in_a_new_process(claim, ctx, model, session, tokens, folder):
    """The clock starts with the model loaded and a context made, and stops when the first token is chosen."""
    path = folder / "chat.llsnap"
    session.save(path)
    found = [_resume(model, path) for _ in range(5)]
    assert {run["token"] for run in found} == {int(session.logits.argmax())}
    resumed = float(np.median([run["seconds"] for run in found]))
    prefill = float(np.median(seconds(lambda: (ctx.seq_rm(2), ctx.prefill(tokens, seq_id=2)), 3, warmup=1)))
    ctx.seq_rm(2)
    claim(
        53,
        f"resuming a session of {N_TOKENS:,} tokens in a new process, to the first token, against its prefill",
        f"1/{prefill / resumed:.0f}: {1e3 * resumed:.1f} ms against {prefill:.2f} s",
        resumed / prefill,
        1 / 50,
    )


def _resume(model: Model, path: Path) -> dict[str, Any]:
    code = """
import json, sys, time
from llamastate import Context, Model, Session
with Model(sys.argv[1]) as model, Context(model, n_ctx=4096, n_seq_max=4, flash_attn="on") as ctx:
    start = time.perf_counter()
    session = Session.load(ctx, sys.argv[2])
    done = session.generate(1, stop=())
    print(json.dumps({"seconds": time.perf_counter() - start, "token": done.tokens[0]}))
"""
    command = [sys.executable, "-c", code, str(model.path), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- going back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "n"), [(54, 1), (55, 1500)])
def test_undo(benchmark, claim, ctx, session, tokens, blob, row, n):
    """Full attention: a trim, whatever the length. Before each, 47 MB went through the caches, as with any decode."""
    trim = raw.trim(ctx, [0], N_TOKENS - n)

    def other() -> float:
        become(session, blob, tokens)
        return stopwatch(trim)()

    def begin() -> None:
        become(session, blob, tokens)
        session._history.replace([Checkpoint(N_TOKENS - n)])

    def end() -> None:
        assert (session.n_past, ctx.seq_pos_max(0)) == (N_TOKENS - n, N_TOKENS - n - 1)

    result = pairs(benchmark, session.undo, other, rounds=101, begin=begin, end=end)
    become(session, blob, tokens)
    session._history.replace([])
    claim(
        row,
        f"undo of {n:,} token{'s' if n > 1 else ''}, full attention; no byte is copied",
        f"{1e6 * result.our_median:.0f} µs, of which llama_memory_seq_rm takes {1e6 * result.other_median:.0f}",
        1e6 * result.our_median,
        100,
        unit="µs",
    )


def test_checkpoint(claim, session):
    def checkpoint() -> None:
        session.checkpoint()
        session._history.replace([])

    median = 1e6 * float(np.median(seconds(checkpoint, 1001, warmup=10)))
    tracemalloc.start()
    session.checkpoint("a turn")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    claim(56, "checkpoint, full attention", f"{median:.1f} µs", median, 20, unit="µs")
    claim(57, "checkpoint, full attention: its memory", f"{held} bytes", held, 1000, unit="bytes")


def become(session: Session, blob: Any, tokens: Any) -> None:
    """Put the tokens that were undone back without decoding them again, and end redo."""
    session.ctx.state_seq_set_data(blob, session.seq_id)
    session._witness.accept()
    session._tokens = tokens
    session._redo.clear()


class Partial:
    """A session of 900 tokens, a checkpoint, 100 more tokens; and the calls that go to and fro by hand."""

    def __init__(self, kind: str) -> None:
        path = models.gemma3() if kind == "Gemma 3 270M" else tiny.path(kind.split()[1], **WIDE[kind.split()[1]])
        self.model = Model(path)
        self.ctx = Context(self.model, n_ctx=2048, n_seq_max=2, flash_attn="on", n_threads=CORES)
        self.ids = np.random.default_rng(1).integers(0, min(self.model.n_vocab, 256), 1000).astype(np.int32)
        self.session = Session(self.ctx, checkpoint_every=0)
        self.session.feed(self.ids[:900])
        _ = self.session.logits
        self.bytes_partial = self.ctx.state_seq_get_size(0, SeqFlags.PARTIAL_ONLY)
        self.bytes_whole = self.ctx.state_seq_get_size(0)
        self.size = raw.get_size(self.ctx, 0, SeqFlags.PARTIAL_ONLY)
        self.rm = raw.function("llama_memory_seq_rm")
        self.memory = raw.function("llama_get_memory")(raw.pointer(self.ctx))
        self.recurrent = self.model.is_recurrent or self.model.is_hybrid

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    def take(self) -> tuple[Any, Any]:
        """Into new memory, for it is to be kept; with the row of logits, where no other way leads back to it."""
        out = np.empty(self.size(), np.uint8)
        assert raw.get_data(self.ctx, out, 0, SeqFlags.PARTIAL_ONLY)() == out.nbytes
        return out, self.session._logits.copy() if self.recurrent else None


@pytest.fixture
def partial_state(request: pytest.FixtureRequest) -> Any:
    found = Partial(request.param)
    yield found
    found.close()


KINDS = ["Gemma 3 270M", "tiny iswa", "tiny mamba", "tiny jamba"]


@pytest.mark.parametrize("partial_state", KINDS, indirect=True)
def test_partial_checkpoint(benchmark, claim, request, partial_state):
    p, kind = partial_state, request.node.callspec.params["partial_state"]
    kept: list[Any] = [None, None]

    def by_hand() -> None:
        kept[0] = p.take()

    def ours() -> None:
        kept[1] = p.session.checkpoint()

    result = pairs(
        benchmark,
        ours,
        stopwatch(by_hand),
        rounds=201,
        warmup=10,
        end=lambda: p.session._history.replace([]),
    )
    logits = 0 if kept[1].logits is None else kept[1].logits.nbytes
    assert kept[1].nbytes == p.bytes_partial + logits
    n_bytes = f"{p.bytes_partial:,} of {p.bytes_whole:,} bytes" + (f" and {logits:,} of logits" if logits else "")
    claim(
        60 + KINDS.index(kind),
        f"checkpoint, {kind}, {n_bytes}, against the raw calls",
        against(result, 1e6, "µs"),
        result.ratio,
        1.3,
    )


@pytest.mark.parametrize("partial_state", KINDS, indirect=True)
def test_partial_undo(benchmark, claim, request, partial_state):
    p, kind = partial_state, request.node.callspec.params["partial_state"]
    session = p.session
    state, row = p.take()
    target = np.empty_like(session._logits)
    session.checkpoint()
    session.feed(p.ids[900:])
    whole = p.ctx.state_seq_get_data(0)
    put = raw.set_data(p.ctx, state, 0, SeqFlags.PARTIAL_ONLY)

    def by_hand() -> None:
        assert put() == state.nbytes
        p.rm(p.memory, 0, 900, -1)
        if row is not None:
            target[:] = row

    timed = stopwatch(by_hand)

    def other() -> float:
        become(session, whole, p.ids)
        return timed()

    replayed = []
    result = pairs(
        benchmark,
        lambda: replayed.append(session.undo()),
        other,
        rounds=101,
        warmup=5,
        begin=lambda: become(session, whole, p.ids),
    )
    assert set(replayed) == {0}
    claim(
        64 + KINDS.index(kind),
        f"undo of 100 tokens, {kind}, against the raw calls",
        against(result, 1e6, "µs"),
        result.ratio,
        1.3,
    )


@pytest.mark.parametrize("partial_state", ["tiny jamba"], indirect=True)
def test_replay_is_bounded(claim, partial_state):
    """Back to any point that nobody has marked."""
    spacing, replayed = 64, []
    p = partial_state
    for n in range(10, 990, 49):
        session = Session(p.ctx, 1, checkpoint_every=spacing)
        session.feed(p.ids)
        replayed.append(session.rollback(n))
        p.ctx.seq_rm(1)
    claim(
        68,
        f"going back to any point, hybrid, checkpoints every {spacing} tokens: tokens decoded again at most",
        f"{max(replayed)}, {np.mean(replayed):.0f} on average",
        max(replayed),
        spacing,
        unit="tokens",
    )


# --- llama-cpp-python -------------------------------------------------------------------------------------------------


def test_edit(claim, ctx, session, tokens, blob):
    """Remember, say something, take it back. What it costs to say it is the same for both, and left out."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(models.smollm2()), n_ctx=4096, n_threads=CORES, n_threads_batch=CORES, verbose=False)
    llm.eval(tokens.tolist())
    edit = tokens[:16]
    speaking = []

    def theirs() -> float:
        start = time.perf_counter()
        state = llm.save_state()
        saved = time.perf_counter()
        llm.eval(edit.tolist())
        said = time.perf_counter()
        llm.load_state(state)
        end = time.perf_counter()
        return end - said + saved - start

    times = []

    def ours() -> None:
        start = time.perf_counter()
        session.checkpoint()
        saved = time.perf_counter()
        session.feed(edit)
        said = time.perf_counter()
        session.undo()
        end = time.perf_counter()
        times.append(end - said + saved - start)
        speaking.append(said - saved)
        assert session.n_past == N_TOKENS

    other = []
    for _ in range(23):
        ours()
        other.append(theirs())
    llm.close()
    become(session, blob, tokens)
    mine, his = float(np.median(times[2:])), float(np.median(other[2:]))
    claim(
        58,
        "checkpoint + undo around an edit of 16 tokens, against llama-cpp-python's save_state + load_state",
        f"{his / mine:,.0f} × faster: {1e3 * mine:.3f} against {1e3 * his:.0f} ms "
        f"(the edit itself takes {1e3 * np.median(speaking):.0f} ms)",
        his / mine,
        20,
        at_least=True,
    )
