"""Writing behind: nothing that was put is lost without a word, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest

from llamastate.prefix import PrefixStore, levels
from llamastate.prefix.behind import WriteBehind
from llamastate.prefix.disk import DiskTier
from tests import children
from tests.prefix.entries import chain


class Place:
    """A tier in a dictionary, which can be made slow or made to fail."""

    def __init__(self):
        self.entries = {}
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def known(self, keys):
        return {key for key in keys if key in self.entries}

    def tails(self, parent):
        return []

    def get(self, key):
        return self.entries.get(key)

    def touch(self, keys):
        pass

    def put(self, entry):
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.entries[entry.key] = entry
        return True

    def close(self):
        self.closed = True


EXIT = """
import sys
from llamastate.prefix import PrefixStore
from tests.prefix.entries import chain

store = PrefixStore(sys.argv[1])
for entry in chain(300, n_bytes=20_000):
    store._levels.keep(entry)
if len(sys.argv) > 2:
    exec(sys.argv[2])
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "del store", "holder = [store]; holder.append(holder)"])
def test_a_program_that_ends_without_close(tmp_path: Path, end: str):
    done = children.run(EXIT, tmp_path, end)
    assert (done.returncode, done.stderr) == (0, "")
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        assert tier.stats().entries == 300


def test_a_store_that_nobody_closed(tmp_path: Path):
    """Python says so, and what was on its way arrives."""
    place = Place()
    place.gate.clear()
    entries = chain(5)
    store = PrefixStore(tmp_path, remote=place)
    for entry in entries:
        store._levels.keep(entry)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store
        gc.collect()
    assert [(w.category, "was not closed" in str(w.message)) for w in caught] == [(ResourceWarning, True)], [
        str(w.message) for w in caught
    ]
    place.gate.set()
    for _ in range(300):
        if len(place.entries) == 5:
            break
        time.sleep(0.02)
    assert len(place.entries) == 5
    assert not place.closed
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        assert tier.known([e.key for e in entries]) == {e.key for e in entries}


def test_a_store_that_has_written_everything_is_dropped_in_silence(tmp_path: Path):
    store = PrefixStore(tmp_path)
    store._levels.keep(chain(1)[0])
    store.flush()
    threads = [q._thread for q in store._levels._queues if q._thread is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del store
        gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("error", [RuntimeError("no quota"), MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_whatever_a_tier_raises(error: BaseException):
    """The thread goes on, and nobody waits for ever."""
    place = Place()
    place.error = error
    one, two = chain(2)
    with PrefixStore(None, remote=place) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store._levels.keep(one)
        assert store._levels._behind.flush(20)
        assert (store.stats().dropped, store.stats().ram_entries) == (1, 1)
        place.error = None
        store._levels.keep(two)
        assert store._levels._behind.flush(20)
        assert place.known([one.key, two.key]) == {two.key}
        assert store._ram._held == {}


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error(tmp_path: Path):
    with PrefixStore(tmp_path, disk_bytes=10) as store:
        for entry in chain(3):
            store._levels.keep(entry)
        assert store._levels._behind.flush(20)
        assert store.stats().dropped == 3


def test_no_thread_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    one, two = chain(2)
    with PrefixStore(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            store._levels.keep(one)
            assert store._disk.known([one.key]) == {one.key}  # written by who put it
        store._levels.keep(two)
        assert store._levels._behind.flush(20)
        assert store._disk.known([one.key, two.key]) == {one.key, two.key}
        assert store._ram._held == {}


def test_a_slow_remote_place_does_not_hold_up_the_disk(tmp_path: Path):
    place = Place()
    place.gate.clear()
    entries = chain(12)
    with PrefixStore(tmp_path, ram_bytes=4 * entries[0].nbytes, remote=place) as store:
        for entry in entries:
            store._levels.keep(entry)
            assert store._levels._behind.flush(20)
        assert store._disk.known([e.key for e in entries]) == {e.key for e in entries}
        assert place.entries == {}
        place.gate.set()
        store.flush()
        # by way of the disk: most of them had to leave memory
        assert [bytes(place.entries[e.key].image) for e in entries] == [bytes(e.image) for e in entries]
        assert store.stats().dropped == 0


def test_so_many_wait_for_a_remote_place_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(levels, "FAR", 2)
    place = Place()
    place.gate.clear()
    entries = chain(6)
    with PrefixStore(tmp_path, remote=place) as store:
        store._levels.keep(entries[0])
        while not store._levels._far._busy:
            time.sleep(0.001)
        for entry in entries[1:]:
            store._levels.keep(entry)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store._levels.keep(chain(1, seed="last")[0])
            assert store._levels._behind.flush(20)
            place.gate.set()
            store.flush()
        assert ["2 entries wait for the remote place" in str(w.message) for w in caught] == [True]
        assert store.stats().dropped == 4
        assert place.known([e.key for e in entries]) == {e.key for e in entries[:3]}
        assert store._disk.stats().entries == 7
    assert not place.closed


def test_what_the_disk_refuses_goes_to_the_remote_place(tmp_path: Path):
    for behind in (True, False):
        place = Place()
        (entry,) = chain(1)
        with PrefixStore(tmp_path / "s", disk_bytes=10, remote=place, write_behind=behind) as store:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(OSError):
                    store._levels.keep(entry)
                store.flush()
            assert set(place.entries) == {entry.key}
            assert store._ram._held == {}


def test_closed_while_it_works():
    queue = WriteBehind("x")
    done = []
    gate = threading.Event()
    queue.submit(gate.wait)
    queue.submit(lambda: (queue.close(), done.append(1)))  # in the thread itself: does not wait for itself
    assert queue.waiting == 2
    gate.set()
    queue.close()
    assert done == [1]
    assert queue.waiting == 0
    assert not queue.submit(lambda: done.append(2))
    queue.close()
    assert done == [1]


@pytest.mark.parametrize("n_waiting", [0, 8])
def test_reading_takes_one_buffer_where_memory_is_full_of_what_waits(tmp_path: Path, n_waiting: int) -> None:
    n_bytes = 200_000
    stored, waiting = chain(6, n_bytes=n_bytes), chain(n_waiting, seed=1, n_bytes=n_bytes)
    size = stored[0].nbytes
    with PrefixStore(tmp_path, ram_bytes=8 * size) as store:
        for entry in stored:
            assert store._disk is not None
            store._disk.put(entry)
        for entry in waiting:
            store._ram.put(entry, hold=True)
        keys = [entry.key for entry in stored]
        list(store._levels.fetch_run(keys[:2], size, keep=False))  # imports and caches belong to the first
        tracemalloc.start()
        found = [entry.image[:300].tobytes() for entry in store._levels.fetch_run(keys, size, keep=False) if entry]
        beyond = tracemalloc.get_traced_memory()[1] - (8 - n_waiting) * size
        tracemalloc.stop()
        assert found == [entry.image[:300].tobytes() for entry in stored]
        assert beyond < 1.2 * size
        store._ram.release(entry.key for entry in waiting)
