"""What a run has done already: by name, by content and by run, found in the output itself.

Every line of an output has an ``id`` that is made of what was asked (16 hexadecimal digits of a digest over custom_id
and body) and of the run (16 of one over everything that decides results: the model's content, seeds, defaults). So the
output is its own journal, and no second file can contradict it. The file beside it, ``<output>.journal``, keeps what
digests cannot tell: the run's facts in words, when it was started and stopped, and that there were results at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from llamastate.batch.openai import Line
from llamastate.errors import BatchChangedError, CorruptStateError, StoreFullError
from llamastate.words import brief

__all__ = ["Index", "Journal", "Key", "Record", "is_beginning", "is_headed", "name_of", "read_record", "run_digest"]

_PREFIX = "batch_req_"
#: What every line of an output begins with.
_HEAD = b'{"id":"' + _PREFIX.encode()
#: Hexadecimal digits of each half of a key.
_HALF = 16
_EVENTS = ("start", "results", "stop")
#: Kept in memory of the index, in KiB; the rest is in a file without a name.
_CACHE = 8192


class Key(NamedTuple):
    """What a result was computed from: the two halves of its line's ``id``."""

    body: str
    run: str

    @property
    def id(self) -> str:
        """As it stands in the output."""
        return f"{_PREFIX}{self.body}{self.run}"


class Record(NamedTuple):
    """A line of an output, as far as resuming goes."""

    name: bytes
    custom_id: str | None
    key: Key
    failed: bool
    #: Cut off, for there was no room for more.
    full: bool = False


class _Written(msgspec.Struct):
    id: str
    custom_id: str | None
    error: msgspec.Raw
    response: msgspec.Raw


_written = msgspec.json.Decoder(_Written)
#: How responses tell it. In text its quotes would be escaped, and a response has no field of the caller's.
_NO_ROOM = b'"stop_reason":"full"'


def run_digest(facts: Mapping[str, Any]) -> str:
    """The run's half of every key.

    Parameters
    ----------
    facts : mapping
        Everything that decides results, as JSON types.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=_HALF // 2, person=b"run").hexdigest()


def key_of(line: Line, run: str) -> Key:
    """The key of a line in a run: no two lines of an input have the same."""
    asked = f"{line.custom_id}".encode("utf-8", "surrogatepass") + b"\0" + line.digest
    return Key(hashlib.blake2b(asked, digest_size=_HALF // 2, person=b"asked").hexdigest(), run)


def name_of(custom_id: str | None, body: str) -> bytes:
    """What a line is found by, 16 bytes: its custom_id, or what it says where there is none."""
    text = f"id {custom_id}" if custom_id is not None else f"line {body}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_record(line: bytes) -> Record | None:
    """What a line of an output is a result of; None if it is no line of ours, or not all of one."""
    try:
        found = _written.decode(line)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    key = found.id.removeprefix(_PREFIX)
    if len(found.id) != len(_PREFIX) + 2 * _HALF or len(key) != 2 * _HALF or set(key) - set("0123456789abcdef"):
        return None
    body, run = key[:_HALF], key[_HALF:]
    failed, full = bytes(found.error) != b"null", _NO_ROOM in bytes(found.response)
    return Record(name_of(found.custom_id, body), found.custom_id, Key(body, run), failed, full)


def is_headed(line: bytes) -> bool:
    """Whether it begins as lines of ours do, and has no end."""
    return line.startswith(_HEAD) and not line.endswith(b"\n")


def is_beginning(line: bytes) -> bool:
    """Whether it can be what is left of a line of ours: without its end, or with the zeros of a loss of power."""
    return b"\0" in line or (not line.endswith(b"\n") and (line.startswith(_HEAD) or _HEAD.startswith(line)))


class Index:
    """What is in an output, and what has been read of the input: flat in memory, however many there are."""

    def __init__(self) -> None:
        # Without a name SQLite makes a database of its own, in a file that nobody else sees, once the cache is full.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE}"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE done (name BLOB PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID")
        self._db.execute("CREATE TABLE seen (name BLOB PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, name: bytes, key: Key) -> bool:
        """Note a result; whether it is the first of that name."""
        with _room():
            cursor = self._db.execute("INSERT OR IGNORE INTO done VALUES (?, ?)", (name, key.body + key.run))
        return cursor.rowcount == 1

    def get(self, name: bytes) -> Key | None:
        """The key of the result of that name."""
        row = self._db.execute("SELECT key FROM done WHERE name = ?", (name,)).fetchone()
        return None if row is None else Key(row[0][:_HALF], row[0][_HALF:])

    def remove(self, name: bytes) -> None:
        """Forget a result."""
        self._db.execute("DELETE FROM done WHERE name = ?", (name,))

    def see(self, name: bytes) -> int:
        """Count a line of the input; how many of that name came before."""
        with _room():
            self._db.execute(
                "INSERT INTO seen VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1", (name,)
            )  # fmt: skip
        return int(self._db.execute("SELECT n FROM seen WHERE name = ?", (name,)).fetchone()[0]) - 1

    def close(self) -> None:
        """Let it go. Idempotent."""
        self._db.close()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreFullError(f"there is no room for temporary files: {error}", path=None) from error


class Journal:
    """The file beside an output.

    Parameters
    ----------
    path : str
        Of it.
    facts : mapping
        Of the run now.

    Raises
    ------
    CorruptStateError
        What is there is no journal, or nothing is left of it.
    OSError
    """

    def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, dict(facts)
        self.run = run_digest(facts)
        found = _read(path)
        #: Whether there is a file at all.
        self.exists = found is not None
        self._lines = found or []

    @property
    def known(self) -> bool:
        """Whether there is one already."""
        return bool(self._lines)

    @property
    def had_results(self) -> bool:
        """Whether results were written."""
        return any(line.get("event") == "results" for line in self._lines)

    @property
    def last_run(self) -> dict[str, Any]:
        """The facts of the run that came last; empty if none is known."""
        return next((run for line in reversed(self._lines) if isinstance(run := line.get("run"), dict)), {})

    @property
    def input(self) -> Any:
        """What the input was when it was last read for changes."""
        return next((line["input"] for line in reversed(self._lines) if line.get("input")), None)

    def require_run(self, found: str, path: str) -> None:
        """Refuse results of another run.

        Raises
        ------
        BatchChangedError
            ``found`` is the run of a result in the output, and not this one.
        """
        if found == self.run:
            return
        then = next((line.get("run") for line in self._lines if line.get("digest") == found), None)
        fields = dict.fromkeys([*self.facts, *(then or ())])
        name = "run" if then is None else next(f for f in fields if then.get(f) != self.facts.get(f))
        was, now = ("", "") if then is None else (then.get(name), self.facts.get(name))
        if then is None:
            words = "they were computed with other options"
        elif name == "v_trans":  # how states show it; callers know it by another name, and the other way round
            words = f"flash_attn was {'off' if was else 'on'!r}, now {'off' if now else 'on'!r}"
        else:
            words = f"{name} was {brief(was)}, now {brief(now)}"
        raise BatchChangedError(
            f"{path!r} holds results of another run: {words}; "
            "do them again (on_change='redo'), or write to another file",
            path=path, field=name, expected=was, found=now,
        )  # fmt: skip

    def begin(self, **more: Any) -> None:
        """Note that a run begins."""
        if next((line["digest"] for line in reversed(self._lines) if line.get("digest")), None) != self.run:
            self.note(digest=self.run, run=self.facts)
        self.note(event="start", **more)

    def note(self, **facts: Any) -> None:
        """Add a line, and bring it to the disk.

        Raises
        ------
        OSError
        """
        line = {"time": int(time.time()), **facts}
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            data = json.dumps(line).encode() + b"\n"
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                data = b"\n" + data  # what somebody was killed in the middle of is a line of its own, and no JSON
            os.write(fd, data)
            os.fsync(fd)  # it says whose the output is that may have lost its lines with the power
        finally:
            os.close(fd)
        self.exists = True
        self._lines.append(line)

    def forget(self) -> None:
        """Begin anew."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.exists = False
        self._lines = []


def _read(path: str) -> list[dict[str, Any]] | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _foreign(path, "it is no ordinary file")  # a pipe would be waited for
        with open(path, "rb") as file:
            raws = [raw for raw in file if raw.strip(b"\0 \r\n")]
    except FileNotFoundError:
        return None
    found = [line for raw in raws if (line := _line(raw))]
    torn = len(raws) == 1 and not raws[0].endswith(b"\n") and raws[0].startswith(b'{"time": '[: len(raws[0])])
    if raws and not found and not torn:
        raise _foreign(path, "no line of it is of a journal")
    return found


def _line(raw: bytes) -> dict[str, Any] | None:
    """One that was written here; of those that are damaged nothing is made."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    of_run = isinstance(line.get("digest"), str) and isinstance(line.get("run"), dict)
    return line if of_run or line.get("event") in _EVENTS else None


def _foreign(path: str, reason: str) -> CorruptStateError:
    return CorruptStateError(
        f"{path!r} is no journal, or is damaged ({reason}): move it away to go on; what is done is told by the output",
        path=path, reason=reason, section="journal",
    )  # fmt: skip
