"""What is done already: which results of an output stand, and what an input's lines go by in it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace

from llamastate.batch.journal import Index, Record, key_of, name_of
from llamastate.batch.openai import Line, read_line
from llamastate.batch.outfile import OutputFile
from llamastate.batch.source import Source
from llamastate.errors import BatchChangedError, InvalidArgumentError, InvalidRequestError
from llamastate.words import brief

__all__ = ["Placing", "changed", "take_up"]

#: Names that an error about changed bodies tells, of any number.
_TELL = 8


class Placing:
    """The lines of an input, each with the name that its result goes by."""

    def __init__(self, source: Source, index: Index | None = None) -> None:
        self._source = source
        self._index = index or Index()

    def lines(self) -> Iterator[tuple[Line, bytes]]:
        """All of them, once."""
        index = self._index
        for number, raw in self._source.lines():
            line = raw if isinstance(raw, Line) else read_line(raw, number)
            if line.custom_id is not None:
                name = name_of(line.custom_id, "")
                if not index.see(name):
                    yield line, name
                    continue
                line = _repeated(line, raw if isinstance(raw, bytes) else line.digest)
            # what it says is all that tells such a line from others, and a count where they say the same
            n = index.see(name_of(None, line.digest.hex()))
            if n:
                line = replace(line, digest=_digest(b"%d " % n + line.digest))
            yield line, name_of(None, key_of(line, "").body)

    def close(self) -> None:
        """Let go of what it has counted."""
        self._index.close()


def take_up(
    output: OutputFile,
    source: Source,
    index: Index,
    run: str,
    *,
    resume: bool = True,
    retry_errors: bool = False,
    on_change: str = "error",
) -> None:
    """Open an output and note in ``index`` what is done; refuse, or remove, what has changed.

    Parameters
    ----------
    output : OutputFile
        Not open yet.
    source : Source
    index : Index
        Empty; afterwards every result that stands, by name.
    run : str
        The digest of what decides results besides the requests.
    resume, retry_errors, on_change
        As of :func:`~llamastate.batch.run_batch`.

    Raises
    ------
    BatchChangedError
        Before anything has been changed.
    InvalidArgumentError
        ``on_change`` is "redo", and the input cannot be read twice.
    """
    if not resume:
        output.open(None, anew=True, input=source.stamp)
        return
    dropped = output.scan(index, on_change=on_change, drop_failed=retry_errors)
    stamp = source.stamp
    if output.n_found and source.again and (stamp is None or stamp != output.journal.input):
        dropped += _compare(output, source, index, run, on_change)
    elif on_change == "redo" and output.n_found and not source.again:
        raise InvalidArgumentError(
            "on_change='redo' needs an input that can be read twice", name="on_change", value=on_change
        )

    def keep(record: Record) -> bool:
        """As the index has it, and once."""
        return index.get(record.name) == record.key and not index.see(b"kept" + record.name)

    output.open(keep if dropped else None, input=stamp)


def _compare(output: OutputFile, source: Source, index: Index, run: str, on_change: str) -> int:
    """Look for requests that are not what was answered under their names; forget those answers."""
    names: list[str] = []
    count = 0
    with contextlib.closing(Placing(source)) as placing:
        for line, name in placing.lines():
            key = index.get(name)
            if key is not None and key.body != key_of(line, run).body:
                count += 1
                if len(names) < _TELL:
                    names.append(str(line.custom_id))
                if on_change == "redo":
                    index.remove(name)
    if count and on_change == "error":
        raise changed(output.path, names, count)
    return count


def changed(path: str, names: list[str], count: int) -> BatchChangedError:
    """The error for answers to other requests than these."""
    told = ", ".join(map(repr, names)) + (", ..." if count > len(names) else "")
    return BatchChangedError(
        f"{path!r} has answers to other requests by the names {told}: "
        "do them again (on_change='redo'), or write to another file",
        path=path, field="body", custom_ids=tuple(names), count=count,
    )  # fmt: skip


def _repeated(line: Line, raw: bytes) -> Line:
    """A line whose custom_id an earlier one had: its error cannot go by that name, which is the earlier one's."""
    error = InvalidRequestError(
        f"line {line.number}: custom_id {brief(line.custom_id)} was used before",
        code="duplicate_custom_id", param="custom_id", line=line.number, custom_id=line.custom_id, reason="used before",
    )  # fmt: skip
    return Line(line.number, None, "", b"", _digest(raw.strip()), error)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=b"line").digest()
