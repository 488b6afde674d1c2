"""Several processes on one database, and processes that are killed in the middle of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamastate.log import SessionLog, SQLiteLogStore
from tests import children

WRITERS, EACH = 8, 40

#: Eight processes, forked so that they begin at once, append to one session. Every other one goes on apart when it
#: comes too late, the rest look again and retry.
APPENDERS = """
import json, os, sys
from llamastate.errors import HeadMovedError
from llamastate.log import SessionLog, SQLiteLogStore, user
path, writers, each = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
gate, open_gate = os.pipe()

def write(name, pipe):
    os.read(gate, 1)
    with SQLiteLogStore(path) as store:
        log = SessionLog.open(store, "shared")
        moved = 0
        for i in range(each):
            while True:
                try:
                    log.save_delta([user(f"{name}-{i}a"), user(f"{name}-{i}b")])
                    break
                except HeadMovedError as error:
                    assert error.expected == log.head_hash != error.found
                    moved += 1
                    if name % 2 and i == each // 2:
                        assert log.ensure_head_or_fork()
                    else:
                        log.refresh()
        os.write(pipe, json.dumps([name, log.id, moved]).encode() + b"\\n")

pids = []
read, report = os.pipe()
for name in range(writers):
    pid = os.fork()
    if not pid:
        try:
            write(name, report)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    pids.append(pid)
os.write(open_gate, b"x" * writers)
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * writers
os.close(report)
print(os.fdopen(read).read(), end="")
"""


def test_eight_processes_append_to_one_session(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with SQLiteLogStore(path) as store:
        SessionLog.create(store, session_id="shared")
        done = children.run(APPENDERS, path, WRITERS, EACH)
        assert done.returncode == 0, done.stderr
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(reports) == WRITERS
        shared = SessionLog.open(store, "shared")
        assert shared.verify() == shared.n_entries
        said = [item["content"] for item in shared.restore().history]
        assert len(set(said)) == len(said), "doubled"
        for name, where, _ in reports:
            log = SessionLog.open(store, where)
            log.verify()
            mine = [i["content"] for i in log.restore().history if i["content"].startswith(f"{name}-")]
            assert mine == [f"{name}-{i}{half}" for i in range(EACH) for half in "ab"], "lost, or out of order"
            if where != "shared":
                assert log.info().origin.session_id == "shared"
        # two items that were saved together stand together, whoever came in between
        for first, second in zip(said[::2], said[1::2], strict=True):
            assert (first[:-1], first[-1], second[-1]) == (second[:-1], "a", "b")


#: Forks writers one after the other, and kills each at any moment after it has begun. What a writer was told to be
#: recorded it passes on before it goes on.
KILLED = """
import os, random, signal, sys, time
from llamastate.log import SessionLog, SQLiteLogStore, user
path, runs, sync = sys.argv[1], int(sys.argv[2]), sys.argv[3]
chance = random.Random(sync)

def write(run, pipe):
    with SQLiteLogStore(path, sync=sync) as store:
        log = SessionLog.open(store, "a")
        for i in range(10**6):
            if i % 5 == 4:
                other = log.fork()
                os.write(pipe, f"{other.id} {other.head_hash}\\n".encode())
            elif i % 5 == 3:
                with log.transaction():
                    for part in range(20):
                        log.save_delta([user(f"{run} {i} {part}")])
                    unsaved = log.head_hash
                os.write(pipe, f"a {unsaved}\\n".encode())
            else:
                os.write(pipe, f"a {log.save_delta([user('x' * 300), {'n': i}])}\\n".encode())
            if i > 30:  # not for ever: forks copy
                log = SessionLog.open(store, "a")
                time.sleep(0.001)

acknowledged = 0
for run in range(runs):
    read, pipe = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        write(run, pipe)
    os.close(pipe)
    first = os.read(read, 1 << 16)
    time.sleep(chance.uniform(0, 0.012))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it died by itself"
    lines = first + b"".join(iter(lambda: os.read(read, 1 << 16), b""))
    os.close(read)
    with SQLiteLogStore(path, sync=sync) as store:
        for line in lines.decode().splitlines():
            name, head = line.split()
            assert store.find(name, head) is not None, f"run {run}: {line} is gone"
            acknowledged += 1
        n = SessionLog.open(store, "a").verify()
    if n > 500:  # so that the runs stay quick
        with SQLiteLogStore(path) as store:
            for info in store.sessions(limit=20):
                SessionLog.open(store, info.id).verify()
        for end in ("", "-wal", "-shm"):
            if os.path.exists(path + end):
                os.unlink(path + end)
        with SQLiteLogStore(path) as store:
            SessionLog.create(store, session_id="a")
print(acknowledged)
"""


@pytest.mark.parametrize(("sync", "runs"), [("normal", 160), ("full", 40)])
def test_what_was_acknowledged_survives_a_kill(sync: str, runs: int, tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with SQLiteLogStore(path) as store:
        SessionLog.create(store, session_id="a")
    done = children.run(KILLED, path, runs, sync)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > runs


#: Dies at a moment when the file has just been made, or not quite.
BORN = """
import os, signal, sys
from llamastate.log import SessionLog, SQLiteLogStore
import time, random
chance = random.Random(1)
for run in range(40):
    path = f"{sys.argv[1]}/{run}.db"
    read, pipe = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(pipe, b"x")
        SQLiteLogStore(path)
        time.sleep(5)
    os.read(read, 1)
    time.sleep(chance.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with SQLiteLogStore(path) as store:
        assert SessionLog.create(store).verify() == 1
"""


def test_killed_while_it_makes_the_file(tmp_path: Path) -> None:
    done = children.run(BORN, tmp_path)
    assert done.returncode == 0, done.stderr


#: A connection must not be used on both sides of a fork.
FORKED = """
import os, sys
from llamastate.log import SessionLog, SQLiteLogStore
store = SQLiteLogStore(sys.argv[1])
log = SessionLog.create(store, session_id="a")
pid = os.fork()
if not pid:
    log.save_turn_end(1)
    store.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert log.refresh()
log.save_turn_end(2)
assert log.verify() == 3
"""


def test_a_fork_of_the_process_opens_the_file_anew(tmp_path: Path) -> None:
    done = children.run(FORKED, tmp_path / "log.db")
    assert done.returncode == 0, done.stderr
