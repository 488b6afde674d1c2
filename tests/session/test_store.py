"""Sessions with a store of prefixes: what is loaded is as exact as what is decoded, and a store can only save time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from llamastate import Context, Session
from llamastate._native import decode
from llamastate.errors import ClosedError, InvalidArgumentError, NoKVSlotError, NotEnoughCellsError
from llamastate.prefix import PrefixStore
from tests.helpers import KINDS, assert_same_logits, context, model, tokens
from tests.session.test_property import BOTH, Lives, live

BLOCK = 16
PROMPT = tokens(96, 1)
ONE, TWO = (np.concatenate([PROMPT, tokens(50, seed)]) for seed in (2, 3))
#: One of each, for what does not depend on more.
FEW = ("dense", "iswa", "mamba", "jamba", "lfm2swa")


@pytest.fixture
def store() -> Iterator[PrefixStore]:
    with PrefixStore(None, block_tokens=BLOCK) as found:
        yield found


def check(session: Session, wanted: Any) -> None:
    """It holds these tokens, and goes on as if it had decoded them."""
    assert session.tokens.tolist() == [int(t) for t in wanted]
    assert session.ctx.seq_pos_max(session.seq_id) == len(wanted) - 1
    kind = next(name for name in KINDS if model(name) is session.ctx.model)
    with context(kind, n_ctx=1024) as fresh:
        fresh.prefill(wanted)
        assert_same_logits(session.logits, fresh.logits())


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each decode has."""
    found: list[int] = []
    step = Session._decode

    def counting(self: Session, ids: Any, **options: Any) -> None:
        found.append(len(ids))
        step(self, ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_decode", counting)
        yield found


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, {"n_seq_max": 3}, {"n_seq_max": 2, "kv_unified": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_another_session_begins_where_the_first_has_been(kind: str, way: dict[str, Any], store: PrefixStore) -> None:
    with context(kind, n_ctx=1024, n_batch=64, **way) as first, context(kind, n_ctx=1024, n_batch=64, **way) as second:
        result = Session(first).sync(PROMPT, store=store)
        assert result == (0, 0, len(PROMPT), 0)
        Session(first, tokens=PROMPT).feed(ONE[96:], store=store)
        session = Session(second)
        result = session.sync(TWO, store=store)
        assert result == (96, 0, 50, 96)
        check(session, TWO)
        # and back and forth, with nothing but what came from the store
        session.checkpoint()
        for n in (140, 97, 96):
            session.rollback(n)
            check(session, TWO[:n])
        session.feed(TWO[96:])
        session.rollback(40)
        check(session, TWO[:40])
        session.sync(ONE, store=store)
        check(session, ONE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_prompt_is_there(kind: str, store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token can be chosen: with full attention the last one is decoded again, else the logits were kept."""
    with context(kind, n_seq_max=2) as ctx:
        first = Session(ctx)
        first.sync(PROMPT, store=store)
        session = Session(ctx, 1)
        with counted(monkeypatch) as decoded:
            assert session.sync(PROMPT, store=store) == (96, 0, 0, 96)
            assert not decoded
            check(session, PROMPT)
            assert decoded == ([1] if ctx.schema.kind == "attention" else [])
        assert session.generate(5).tokens == first.generate(5).tokens


@pytest.mark.parametrize("kind", FEW)
def test_the_whole_prompt_without_its_logits(kind: str, store: PrefixStore) -> None:
    """As a context stores it; a recurrent state cannot be decoded onto once more."""
    with context(kind, n_seq_max=2) as ctx:
        ctx.decode(PROMPT[:70])
        store.put(ctx, 0, PROMPT[:70])
        ctx.decode(PROMPT[70:])
        store.put(ctx, 0, PROMPT)
        session = Session(ctx, 1)
        result = session.sync(PROMPT, store=store)
        assert result.loaded == (70 if kind in ("mamba", "jamba", "lfm2swa") else 96)
        check(session, PROMPT)


@pytest.mark.parametrize("kind", KINDS)
def test_over_what_a_session_holds(kind: str, store: PrefixStore) -> None:
    """Its checkpoints lead back to what it shares with the new tokens, and no longer to anything else."""
    with context(kind, n_seq_max=3) as ctx:
        Session(ctx, 1).sync(ONE, store=store)
        session = Session(ctx)
        session.feed(ONE[:40])
        early = session.checkpoint("early")
        session.feed(tokens(50, 9))
        session.checkpoint("gone")
        assert session.sync(ONE, store=store).loaded >= 144
        assert session.checkpoints == (early,)
        check(session, ONE)
        session.undo()
        check(session, ONE[:40])
        session.redo()
        check(session, ONE)


@pytest.mark.parametrize("kind", FEW)
def test_what_a_session_holds_is_not_loaded(kind: str, store: PrefixStore) -> None:
    with context(kind, n_seq_max=2) as ctx:
        session = Session(ctx, store=store)
        session.feed(ONE)
        store.put(session)
        queries = store.stats().queries
        assert session.sync([*ONE, 7]) == (len(ONE), 0, 1, 0)
        assert session.feed([1, 2, 3]) == 3
        assert store.stats().queries == queries


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_of_its_own_uses_it_everywhere(kind: str, store: PrefixStore) -> None:
    """Also on the way back: what no checkpoint leads to is loaded instead of decoded again."""
    with context(kind, n_ctx=1024, n_seq_max=2) as ctx:
        session = Session(ctx, store=store, checkpoint_every=0)
        session.feed(PROMPT)
        session.generate(8)
        whole = session.tokens
        with context(kind, n_ctx=1024) as elsewhere:
            other = Session(elsewhere, store=store, checkpoint_every=0)
            assert other.sync([*whole, *tokens(60, 4)]).loaded >= 96
            branched = other.feed(tokens(40, 5))
            assert branched == 40
            replayed = other.rollback(100)
            assert replayed <= 4
            check(other, whole[:100])
        twin = session.branch(1)
        twin.feed([5])
        assert store.lookup([*whole, 5, 6], ctx=ctx) >= 96
        check(twin, [*whole, 5])


def test_on_disk_across_restarts(tmp_path: Path) -> None:
    for kind in ("dense", "iswa", "jamba"):
        for expected in (0, 96):
            with PrefixStore(tmp_path / kind, block_tokens=BLOCK) as store, context(kind) as ctx:
                session = Session(ctx, store=store)
                session.feed(PROMPT)
                assert store.stats().hit_tokens == expected
                check(session, PROMPT)


def test_asyncio(store: PrefixStore) -> None:
    async def main() -> None:
        with context("jamba", n_seq_max=2) as ctx:
            first, second = Session(ctx), Session(ctx, 1, store=store)
            assert await first.afeed(PROMPT, store=store) == 96
            assert (await second.async_(PROMPT)).loaded == 96
            assert (await second.async_(ONE[:99], store=store)).decoded == 3

    asyncio.run(main())


# --- stores that fail -------------------------------------------------------------------------------------------------


class Failing:
    """A store of which one method raises what an operating system may."""

    def __init__(self, store: PrefixStore, method: str, error: BaseException) -> None:
        self.store, self.method, self.error = store, method, error

    def lookup(self, *arguments: Any, **options: Any) -> int:
        return self._call("lookup", *arguments, **options)

    def load_with_logits(self, *arguments: Any, **options: Any) -> Any:
        return self._call("load_with_logits", *arguments, **options)

    def put(self, *arguments: Any) -> int:
        return self._call("put", *arguments)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(self.store, method)(*arguments, **options)
        if method == self.method:
            raise self.error  # after the harm is done
        return result


@pytest.mark.parametrize("method", ["lookup", "load_with_logits", "put"])
@pytest.mark.parametrize("kind", FEW)
def test_a_store_that_fails(kind: str, method: str, store: PrefixStore, caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(store, method, OSError(5, "Input/output error"))
    with context(kind, n_seq_max=2) as ctx, caplog.at_level(logging.DEBUG, "llamastate.session"):
        Session(ctx, 1).sync(ONE, store=store)
        session = Session(ctx, store=failing)
        session.feed(TWO[:20])
        session.checkpoint()
        for wanted in (ONE, TWO, PROMPT):
            session.sync(wanted)
            check(session, wanted)
        session.rollback(20)
        check(session, TWO[:20])
        assert session.store_error is failing.error
        assert [r.levelname for r in caplog.records].count("WARNING") == 1
        assert "Input/output error" in caplog.text


@pytest.mark.parametrize("kind", FEW)
def test_a_closed_store(kind: str) -> None:
    with context(kind) as ctx, PrefixStore(None, block_tokens=BLOCK) as store:
        session = Session(ctx, store=store)
        session.feed(PROMPT)
        store.close()
        session.sync(ONE)
        session.generate(3)
        assert isinstance(session.store_error, ClosedError)
        session.rollback(len(ONE))
        check(session, ONE)


@pytest.mark.parametrize("kind", FEW)
def test_a_full_store(kind: str) -> None:
    with context(kind) as ctx, PrefixStore(None, block_tokens=BLOCK, ram_bytes=0) as store:
        session = Session(ctx, store=store)
        with pytest.warns(RuntimeWarning, match="takes no more"):
            session.feed(PROMPT)
        check(session, PROMPT)
        session.sync(TWO)
        check(session, TWO)


class Wrong(Failing):
    """One that gives back something else than it says."""

    def __init__(self, store: PrefixStore, n: int, row: Any = None) -> None:
        super().__init__(store, "", OSError())
        self.n, self.row = n, row

    def load_with_logits(self, ctx: Context, seq_id: int, *arguments: Any, **options: Any) -> Any:
        ctx.seq_rm(seq_id)
        ctx.decode([1, 2, 3], seq_id=seq_id)
        return self.n, self.row


@pytest.mark.parametrize(("n", "row"), [(4, None), (96, None), (10**9, None), (3, np.zeros(7)), (3, "x"), (None, None)])
@pytest.mark.parametrize("kind", ["dense", "mamba"])
def test_a_store_that_is_wrong(kind: str, n: Any, row: Any, store: PrefixStore) -> None:
    with context(kind) as ctx:
        session = Session(ctx, store=Wrong(store, n, row))
        session.feed(PROMPT)
        assert session.store_error is not None
        check(session, PROMPT)


@pytest.mark.parametrize("bad", [object(), "store", 1, PrefixStore])
def test_what_is_no_store(bad: Any, store: PrefixStore) -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed([1, 2, 3])
        for attempt in (
            lambda: session.feed([4], store=bad),
            lambda: session.sync([4], store=bad),
            lambda: Session(ctx, 0, tokens=[1, 2, 3], store=bad),
        ):
            if bad is not PrefixStore:  # a class has the methods of its instances
                with pytest.raises(InvalidArgumentError):
                    attempt()
        check(session, [1, 2, 3])


# --- calls that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba"])
def test_a_full_cache_after_loading(kind: str, store: PrefixStore) -> None:
    with context(kind, n_ctx=256) as ctx:
        session = Session(ctx, store=store)
        session.sync(ONE)
        session.rollback(0)
        session.feed(tokens(30, 5))
        session.checkpoint()
        session.feed(tokens(5, 6))
        points = list(session.history)
        whole = session.tokens
        with pytest.raises(NoKVSlotError):
            session.sync([*ONE, *tokens(200, 7)])
        assert list(session.history) == points
        check(session, whole)
        session.undo()
        check(session, whole[:30])


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "mamba"])
def test_a_full_pool_after_loading(kind: str, store: PrefixStore) -> None:
    """The prefix fits, the rest does not; meanwhile another sequence shares the cells that were given up."""
    with context(kind, n_ctx=256, n_seq_max=3, n_batch=32) as ctx, context(kind) as source:
        Session(source).sync(ONE[:64], store=store)
        session = Session(ctx, store=store)
        session.feed(tokens(130, 8))
        other = session.branch(1)
        whole = session.tokens
        wanted = [*ONE[:64], *tokens(150, 7)]
        if kind == "mamba":
            assert session.sync(wanted).loaded
            check(session, wanted)
        else:
            with pytest.raises((NoKVSlotError, NotEnoughCellsError)):
                session.sync(wanted)
            check(session, whole)
        check(other, whole)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["before", "after", "decode"])
@pytest.mark.parametrize("kind", FEW)
def test_interrupted(kind: str, place: str, store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Failing):
        def load_with_logits(self, *arguments: Any, **options: Any) -> Any:
            if place == "before":
                signal.raise_signal(signal.SIGINT)
            found = self.store.load_with_logits(*arguments, **options)
            if place == "after":
                signal.raise_signal(signal.SIGINT)
            return found

    def interrupted(*arguments: Any) -> Any:
        result = call(*arguments)
        signal.raise_signal(signal.SIGINT)
        return result

    with context(kind, n_seq_max=2) as ctx:
        Session(ctx, 1).sync(PROMPT, store=store)
        session = Session(ctx, store=Interrupted(store, "", OSError()))
        session.feed(tokens(10, 9), store=store)
        session.checkpoint()
        call = decode.decode
        with monkeypatch.context() as patch:
            if place == "decode":
                patch.setattr(decode, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.sync(TWO)
        check(session, tokens(10, 9))
        session.feed([1])
        session.undo()
        check(session, tokens(10, 9))


def test_threads_share_a_store(store: PrefixStore) -> None:
    """Eight sessions in two contexts, all at once."""
    problems: list[BaseException] = []

    def work(session: Session, seed: int) -> None:
        try:
            for round_ in range(4):
                session.sync([*PROMPT, *tokens(20, 10 * seed + round_)])
                session.generate(2)
                session.rollback(60)
        except BaseException as error:
            problems.append(error)

    with context("iswa", n_ctx=2048, n_seq_max=5) as one, context("iswa", n_ctx=2048, n_seq_max=5) as two:
        sessions = [Session(ctx, seq, store=store) for ctx in (one, two) for seq in range(4)]
        threads = [threading.Thread(target=work, args=(s, i)) for i, s in enumerate(sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        for session in sessions:
            check(session, PROMPT[:60])
            assert session.store_error is None


# --- at random --------------------------------------------------------------------------------------------------------


class StoredLives(Lives):
    """The same with a store that both sessions share, which forgets, is full, or fails."""

    loaded = 0

    @initialize(unified=st.booleans(), every=st.sampled_from([0, 16, 48]), budget=st.sampled_from([2, 32]))
    def begin(self, unified: bool, every: int, budget: int) -> None:
        super().begin(unified, every, budget)
        self.turn_into(0, ONE.tolist())
        self.turn_into(1, TWO[:120].tolist())

    def make_store(self) -> Any:
        self.store = PrefixStore(None, block_tokens=BLOCK, ram_bytes=1 << 20)
        self.failing = Failing(self.store, "", OSError(28, "No space left on device"))
        self.seen: list[list[int]] = []
        return self.failing

    def teardown(self) -> None:
        if hasattr(self, "store"):
            type(self).loaded += self.store.stats().hit_tokens
            self.store.close()
        super().teardown()

    @precondition(lambda self: self.seen)
    @rule(which=BOTH, index=st.integers(0, 19), anew=st.booleans(), n=st.integers(0, 20), seed=st.integers(200, 299))
    def return_to(self, which: int, index: int, anew: bool, n: int, seed: int) -> None:
        """To what was there once, in this session or the other, and a little more."""
        if anew:
            self.rollback(which, 0)
        self.turn_into(which, self.seen[index % len(self.seen)] + tokens(n, seed).tolist())

    def check_invariants(self, settings: Any, output: Any, runtimes: Any) -> None:
        super().check_invariants(settings, output, runtimes)
        for wanted in getattr(self, "expected", ()):
            if wanted not in self.seen:
                self.seen.append(list(wanted))

    @rule(what=st.sampled_from(["", "", "", "", "", "lookup", "load_with_logits", "put", "evict"]))
    def break_store(self, what: str) -> None:
        self.failing.method = what
        if what == "evict":
            self.store.evict()


@pytest.mark.parametrize("kind", FEW)
def test_sessions_with_a_store_are_exact(kind: str) -> None:
    machine = type(f"StoredLives_{kind}", (StoredLives,), {"kind": kind})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the prefix store takes no more", RuntimeWarning)
        live(machine, int(os.environ.get("LLAMASTATE_PROPERTY_RUNS", "8")))
    assert machine.loaded > 100, "it was of no use, so nothing was tested"
