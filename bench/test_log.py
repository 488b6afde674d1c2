"""The session log: appending, folding, verifying, opening among very many sessions, and what it takes on disk."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.timing import no_gc, seconds
from llamastate.log import (
    Entry,
    LlmUsage,
    MemoryLogStore,
    SessionLog,
    SessionStart,
    SQLiteLogStore,
    TurnEnd,
    assistant,
    chain,
    export_lines,
    fold,
    group,
    import_jsonl,
    reasoning,
    tool_call,
    tool_result,
    user,
)

N = 100_000
ROOT = Path(__file__).resolve().parent.parent
QUESTION = "When does the next train leave for Ghent, and will it still be raining when I get there?"
ANSWER = "The next train leaves at 10:32 from platform 4 and arrives at 11:04. It rains until noon: take an umbrella. "


def conversation() -> Iterator[Entry]:
    """Entries as a program with tools writes them, for ever: seven a turn."""
    for n in itertools.count(1):
        ts = 1_700_000_000_000 + 1000 * n
        call, answer = f"call_{n:08x}", {"departures": ["10:02", "10:32", "11:02"], "platform": 4, "n": n}
        items = [
            user(QUESTION),
            reasoning("The user wants a time, so I have to ask the timetable first, then the weather."),
            tool_call(call, "timetable", {"from": "Brussels", "to": "Ghent", "limit": 3}),
            tool_result(call, answer),
            assistant(2 * ANSWER),
        ]
        yield from group(items, ts)
        yield LlmUsage(5 * n, 400 + n, 350 + n, 50, 60, ts=ts)
        yield TurnEnd(n, ts=ts)


@pytest.mark.parametrize(("row", "sync", "n"), [(70, "normal", 20_000), (72, "full", 2_000)])
def test_append(claim, folder, row, sync, n):
    """Each append a transaction of its own; and all in one."""
    with SQLiteLogStore(folder / "log.db", sync=sync) as store, no_gc():
        rates = []
        for _ in range(5):
            log = SessionLog.create(store)
            entries = list(itertools.islice(conversation(), n // 5))
            start = time.perf_counter()
            for entry in entries:
                log.append(entry)
            rates.append(len(entries) / (time.perf_counter() - start))
        log = SessionLog.create(store)
        start = time.perf_counter()
        with log.transaction():
            for entry in itertools.islice(conversation(), n):
                log.append(entry)
        together = n / (time.perf_counter() - start)
        assert log.verify() == n + 1
    rate = float(np.median(rates))
    figures = f"{rate:,.0f}/s ({min(rates):,.0f}–{max(rates):,.0f}); {together:,.0f}/s in one transaction"
    if sync == "normal":
        claim(row, "appends, each survives kill -9 (WAL, NORMAL)", figures, rate, 10_000, at_least=True, unit="/s")
    else:
        claim(row, "appends, each survives loss of power (WAL, FULL)", figures)


def test_append_by_eight(claim, folder):
    """Eight processes, each with a session of its own in one store."""
    path, each = folder / "log.db", 2_000
    program = (
        "import sys, itertools\n"
        "from bench.test_log import conversation\n"
        "from llamastate.log import SessionLog, SQLiteLogStore\n"
        "with SQLiteLogStore(sys.argv[1]) as store:\n"
        "    log = SessionLog.create(store)\n"
        "    entries = list(itertools.islice(conversation(), int(sys.argv[2])))\n"
        "    print(flush=True)\n"
        "    sys.stdin.readline()\n"
        "    for entry in entries:\n"
        "        log.append(entry)\n"
    )
    SQLiteLogStore(path).close()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(each)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(8)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline()
    start = time.perf_counter()
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    rate = 8 * each / (time.perf_counter() - start)
    with SQLiteLogStore(path) as store:
        assert [SessionLog.open(store, info.id).verify() for info in store.sessions()] == [each + 1] * 8
    claim(71, "the same, by eight processes at once", f"{rate:,.0f}/s together")


@pytest.fixture(scope="module")
def entries() -> list:
    return chain([SessionStart(system_prompt="You help with travel."), *itertools.islice(conversation(), N - 1)])


def test_fold_and_verify(claim, folder, entries):
    with SQLiteLogStore(folder / "log.db") as store:
        store.create("long", entries)
        log = SessionLog.open(store, "long")
        folding = float(np.median(seconds(lambda: fold(entries), 5)))
        restoring = float(np.median(seconds(log.restore, 5)))
        verifying = float(np.median(seconds(log.verify, 5)))
        forking = float(np.median(seconds(log.fork, 3)))
        assert log.verify() == N
        assert len(log.restore().history) == sum(e.entry.kind in ("user_input", "tool_results") for e in entries) + sum(
            len(e.entry.items) for e in entries if e.entry.kind == "assistant_items"
        )
    claim(73, f"fold {N:,} entries", f"{folding:.2f} s", folding, 1, unit="s")
    claim(74, f"restore {N:,} entries: read, verify, fold", f"{restoring:.2f} s; fork {forking:.2f} s")
    claim(75, f"verify {N:,} entries", f"{verifying:.2f} s", verifying, 1, unit="s")


def test_size(claim, folder, entries):
    path = folder / "log.db"
    plain = sum(len(stored.data) for stored in entries)
    with SQLiteLogStore(path) as store:
        log = SessionLog.create(store, system_prompt="You help with travel.")
        for at in range(1, N, 7):
            with log.transaction():  # a turn
                log.append(*(stored.entry for stored in entries[at : at + 7]))
    size = os.path.getsize(path)
    small = folder / "small.db"
    with SQLiteLogStore(small) as store:
        log = SessionLog.create(store)
        with log.transaction():
            for n in range(20_000):
                log.append(TurnEnd(n))
        smallest = sum(len(stored.data) for stored in log.entries())
    exported, copy = b"".join(export_lines(MemoryCopy(entries))), folder / "copy.db"
    assert len(exported) > plain
    with SQLiteLogStore(copy) as store:
        imported = seconds(lambda: import_jsonl(store, exported.splitlines(keepends=True)), 1, warmup=0)[0]
    claim(
        76,
        f"a store of {N:,} entries, against their JSON",
        f"{size / plain:.2f} ×: {size / 1e6:.1f} against {plain / 1e6:.1f} MB, {plain / N:.0f} bytes an entry; "
        f"of the smallest entries ({smallest / 20_001:.0f} bytes) {os.path.getsize(small) / smallest:.2f} ×; "
        f"as JSON Lines {len(exported) / plain:.2f} ×, imported in {imported:.2f} s",
        size / plain,
        1.5,
    )


class MemoryCopy(MemoryLogStore):
    """A store of one session."""

    def __init__(self, entries: list) -> None:
        super().__init__()
        self.create("long", entries)


#: In a process of its own, as after a restart: opening, listing, nothing else.
OPEN = """
import json, sys, time
from llamastate.log import SQLiteLogStore
start = time.perf_counter()
store = SQLiteLogStore(sys.argv[1])
opened = time.perf_counter()
infos = store.sessions(limit=50)
end = time.perf_counter()
assert len(infos) == 50
print(json.dumps([opened - start, end - opened]))
"""


def test_open_among_many(claim, folder):
    path = folder / "log.db"
    with SQLiteLogStore(path) as store:
        turn = list(itertools.islice(conversation(), 6))
        with store.transaction():
            for n in range(N):
                store.create(f"session-{n:06}", chain([SessionStart(ts=n), *turn[:2]]))
    times = []
    for _ in range(15):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append([1e3 * t for t in json.loads(done.stdout)])
    opening, listing = np.median(times, axis=0)
    both = float(np.median(np.sum(times, axis=1)))
    size = os.path.getsize(path) / 1e6
    claim(
        77,
        f"open a store of {N:,} sessions and list 50",
        f"{both:.1f} ms: {opening:.1f} to open, {listing:.1f} to list ({size:.0f} MB)",
        both,
        50,
        unit="ms",
    )
