"""Several processes on one folder: names are held, killed saves leave the old or the new file, and no litter."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import pytest

from llamastate import SessionManager
from llamastate.errors import SaveError, SessionNotFoundError, StoreLockedError
from tests import children
from tests.helpers import assert_same_logits, context, tokens

#: How often a process is killed in the middle of something.
KILLS = 200

HOLDER = """
import sys
from llamastate import SessionManager
from tests.helpers import context
manager = SessionManager(sys.argv[1])
session = manager.load_or_create("chat", context("dense"), system_prompt=[1, 2, 3])
print("held", flush=True)
sys.stdin.readline()
manager.release("chat")
print("released", flush=True)
sys.stdin.readline()
"""


def test_a_name_belongs_to_one_process(tmp_path: Path) -> None:
    with children.start(HOLDER, tmp_path) as process, context("dense") as ctx:
        assert process.stdout.readline() == "held\n"
        manager = SessionManager(tmp_path)
        for call in (
            lambda: manager.load("chat", ctx),
            lambda: manager.create("Chat", ctx),
            lambda: manager.load_or_create("chat", ctx),
            lambda: manager.delete("chat"),
            lambda: SessionManager(tmp_path, on_busy="wait", timeout=0.1).load("chat", ctx),
        ):
            with pytest.raises(StoreLockedError) as caught:
                call()
            assert caught.value.path.lower() == manager.path("chat").lower()
        assert manager.list()[0].n_tokens == 3
        assert manager.checkpoints("chat") == ()
        other = manager.create("other", ctx)
        with pytest.raises(StoreLockedError):
            manager.save("chat", other)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "released\n"
        ctx.seq_rm(0)
        assert manager.load("chat", ctx).n_past == 3
        process.communicate("\n", timeout=60)


def test_waiting(tmp_path: Path) -> None:
    """Also for a process that is killed."""
    with children.start(HOLDER, tmp_path) as process, context("dense") as ctx:
        assert process.stdout.readline() == "held\n"
        killer = threading.Timer(0.2, process.kill)
        killer.start()
        assert SessionManager(tmp_path, on_busy="wait").load("chat", ctx).n_past == 3
        killer.join()
        process.communicate(timeout=60)


def test_sessions_that_are_gone_hold_nothing(tmp_path: Path) -> None:
    code = """
import sys
from llamastate import SessionManager
from tests.helpers import context
SessionManager(sys.argv[1]).load("chat", context("dense"))
"""
    with context("dense", n_seq_max=2) as ctx:
        manager = SessionManager(tmp_path)
        first = manager.create("chat", ctx, system_prompt=[1])
        second = manager.load("chat", ctx, seq_id=1)
        for _ in range(2):
            run = children.run(code, tmp_path)
            assert run.returncode == 1
            assert "StoreLockedError" in run.stderr
            first = None
            gc.collect()
        assert first is None
        second.close()  # or forget it
        assert children.run(code, tmp_path).returncode == 0
    assert os.listdir(tmp_path) == ["chat.llsnap"]


def test_forked_children_hold_nothing(tmp_path: Path) -> None:
    """A child that lives longer than its parent's lock does not keep it."""
    code = """
import os, sys
from llamastate import SessionManager
from tests.helpers import context
manager = SessionManager(sys.argv[1])
session = manager.create("chat", context("dense"))
child = os.fork()
if not child:
    sys.stdin.readline()
    os._exit(0)
print("forked", flush=True)
os._exit(0)
"""
    with children.start(code, tmp_path) as process, context("dense") as ctx:
        assert process.stdout.readline() == "forked\n"
        process.wait(60)
        SessionManager(tmp_path).load("chat", ctx)
        process.communicate("\n", timeout=60)


def test_threads_create_one(tmp_path: Path) -> None:
    outcomes: list[object] = []

    def create(seq_id: int) -> None:
        try:
            SessionManager(tmp_path).create("chat", ctx, seq_id=seq_id, system_prompt=[seq_id])
            outcomes.append(seq_id)
        except FileExistsError as error:
            outcomes.append(error)

    with context("dense", n_seq_max=8) as ctx:
        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [o for o in outcomes if isinstance(o, int)]
        assert (len(outcomes), len(winners)) == (8, 1)
        assert SessionManager(tmp_path).load("chat", ctx).tokens.tolist() == winners


# --- dying ------------------------------------------------------------------------------------------------------------

#: Creates, saves twice and deletes one session, over and over; another is saved again and again with one text or two.
WORKER = """
import itertools
from llamastate import Session, SessionManager
from tests.helpers import context, tokens
ctx = context("iswa", n_ctx=1024, n_seq_max=3)
long, short = Session(ctx, 0, checkpoint_every=64), Session(ctx, 1, checkpoint_every=64)
long.feed(tokens(300, seed=300))
short.feed(tokens(200, seed=200))

def work(folder, ready):
    manager = SessionManager(folder, on_busy="wait")
    manager.save("kept", long)
    ready()
    for i in itertools.count():
        manager.save("kept", (short, long)[i % 2])
        passing = manager.create("passing", ctx, seq_id=2, system_prompt=tokens(200, seed=200)[:50])
        passing.feed(tokens(200, seed=200)[50:])
        manager.save("passing", passing)
        passing.rollback(0)
        manager.delete("passing")
        manager.release("passing")
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Always the old file or the new one, whole; and whatever lay about is gone after the next start."""
    chance = random.Random(1)
    left_behind = 0
    with context("iswa", n_ctx=1024) as ctx, children.Victims(WORKER) as victims:
        for _ in range(KILLS):
            victims.kill(tmp_path, chance.uniform(0, 0.03))
            left_behind += sum(name.startswith(".") for name in os.listdir(tmp_path))
            manager = SessionManager(tmp_path)
            assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
            infos = {info.name: info for info in manager.list()}
            assert set(infos) in ({"kept"}, {"kept", "passing"})
            assert not any(info.damaged for info in infos.values())
            for name, lengths in (("kept", (200, 300)), ("passing", (50, 200))):
                if name in infos:
                    session = manager.load(name, ctx)
                    assert session.n_past in lengths
                    expected = tokens(300, seed=300) if session.n_past == 300 else tokens(200, seed=200)
                    assert session.tokens.tolist() == expected[: session.n_past].tolist()
                    if name == "kept":
                        points = [p.n_tokens for p in session.history if p.state is not None]
                        assert points == [*range(64, session.n_past, 64)]
                    del session
            if "passing" in infos:
                manager.delete("passing")
            manager.close()
    assert left_behind > KILLS // 10, "or hardly anything was killed in the middle"


def test_files_of_the_living_are_not_litter(tmp_path: Path) -> None:
    with children.start(HOLDER, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        dead = children.run("import os; print(os.getpid())").stdout.strip()
        names = {
            f".other.llsnap.{process.pid}-0123abcd.tmp": True,  # a living process is writing it
            f".chat.llsnap.{dead}-0123abcd.tmp": True,  # some living process has the name
            f".other.llsnap.{dead}-0123abcd.tmp": False,
            f".other.llsnap.{os.getpid()}-0123abcd.tmp": False,  # this one is not writing anything: an id used again
            f".other.ggsq.{dead}-0123abcd.tmp": True,  # nobody's business
        }
        for name in names:
            (tmp_path / name).write_bytes(b"x")
        SessionManager(tmp_path)
        assert {name: (tmp_path / name).exists() for name in names} == names
        process.communicate("\n\n", timeout=60)
    SessionManager(tmp_path)
    assert not (tmp_path / f".chat.llsnap.{dead}-0123abcd.tmp").exists()


def test_a_new_process_goes_back_to_any_turn(tmp_path: Path) -> None:
    """The conversation of one process, rolled back in another."""
    code = """
import sys
from llamastate import SessionManager
from tests.helpers import context, tokens
manager = SessionManager(sys.argv[1])
session = manager.create("chat", context(sys.argv[2]))
for turn in range(5):
    session.feed(tokens(60, turn))
    session.checkpoint(f"turn {turn}")
manager.save("chat", session)
"""
    for kind in ("dense", "iswa", "mamba", "jamba"):
        folder = tmp_path / kind
        run = children.run(code, folder, kind)
        assert run.returncode == 0, run.stderr
        manager = SessionManager(folder)
        with context(kind) as ctx, context(kind) as fresh:
            session = manager.load("chat", ctx)
            point = next(p for p in session.checkpoints if p.label == "turn 2")
            assert session.rollback(point) == 0
            for turn in range(3):
                fresh.prefill(tokens(60, turn))
            assert_same_logits(session.logits, fresh.logits())
            manager.save("chat", session)
        assert manager.checkpoints("chat")[-1].label == "turn 2"
        assert manager.list()[0].n_tokens == 180


def test_a_session_deleted_elsewhere(tmp_path: Path) -> None:
    with context("dense", n_seq_max=2) as ctx:
        manager = SessionManager(tmp_path)
        session = manager.create("chat", ctx, system_prompt=[1])
        os.unlink(manager.path("chat"))
        with pytest.raises(SessionNotFoundError):
            manager.load("chat", ctx, seq_id=1)
        manager.save("chat", session)
        (tmp_path / "chat.llsnap").unlink()
        (tmp_path / "chat.llsnap").mkdir()
        with pytest.raises(SaveError):
            manager.save("chat", session)
