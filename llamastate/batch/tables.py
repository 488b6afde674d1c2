"""Parquet and Arrow files of rows (:mod:`llamastate.batch.dicts`). Needs the extra ``tables``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llamastate.atomic import fsync_folder
from llamastate.batch.dicts import ASKING, COLUMNS, columns_of, row_line
from llamastate.batch.journal import read_record
from llamastate.batch.openai import Line
from llamastate.batch.pipeline import BatchSummary, run_batch
from llamastate.batch.resume import Placing
from llamastate.batch.source import Input, Source, require_apart
from llamastate.errors import (
    BatchChangedError,
    CorruptStateError,
    FileAccessError,
    LoadError,
    SaveError,
    StoreFullError,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TABLES", "is_table", "require_arrow", "run_table"]

_PARQUET = (".parquet", ".pq")
_ARROW = (".arrow", ".feather", ".ipc")
#: What tables are known by.
TABLES = (*_PARQUET, *_ARROW)
#: Rows that are in memory at once.
_ROWS = 256
#: In a table's metadata: this was written here, with such columns.
_MARK = b"llamastate.results"


def is_table(path: Any) -> bool:
    """Whether a path names a table, by its ending."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(TABLES)


def run_table(input: Input | pa.Table, output: str | os.PathLike[str], **options: Any) -> BatchSummary:  # noqa: A002
    """Answer every row of a table, and be able to go on wherever it was ended.

    Parameters
    ----------
    input : path-like or pyarrow.Table
        ``.parquet``, ``.arrow`` (file or stream), or lines of OpenAI's batch format.
    output : path-like
        ``.parquet`` or ``.arrow``: written when everything is done, in the order of the input, atomically; until then
        results are in ``<output>.results.jsonl``, and that is what is gone on from. A table that is there already is
        replaced if it was written here. Anything else gets the lines themselves.
    **options
        As for :func:`~llamastate.batch.run_batch`.

    Returns
    -------
    BatchSummary

    Raises
    ------
    LoadError
        The table cannot be read.
    SaveError
        The table cannot be written; the results are kept.
    CorruptStateError
        ``output`` is somebody else's table. Nothing was changed.
    ImportError
        ``pyarrow`` is not installed.

    Warns
    -----
    UserWarning
        Columns of the input that those of the results take the place of.

    Notes
    -----
    Errors besides these are those of :func:`~llamastate.batch.run_batch`. Memory does not grow with the table.
    """
    source = source_of(input)
    if not is_table(output):
        return run_batch(source, output, **options)
    path = os.path.realpath(os.fspath(output))
    results = results_of(output)
    require_apart(input=source, output=path, results=results)
    _require_ours(path, results)
    hidden = [name for name in source.schema.names if name in COLUMNS] if isinstance(source, _TableSource) else ()
    if hidden:
        words = f"{path!r} will have columns of results in the place of the input's {', '.join(hidden)}"
        warnings.warn(words, stacklevel=2)
    with contextlib.ExitStack() as stack:
        if not source.again:
            source = stack.enter_context(contextlib.closing(_Spooled(input)))
        summary = run_batch(source, results, **options)
        if summary.stopped is None:
            _write_table(source, results, path)
    return summary


def source_of(given: Any) -> Source:
    """The lines of a table, or of anything else that has some."""
    return _TableSource(given) if _is_table_like(given) else Source(given)


def results_of(output: str | os.PathLike[str]) -> str:
    """Where results are kept until a table is written."""
    return f"{os.path.realpath(os.fspath(output))}.results.jsonl"


# --- tables -----------------------------------------------------------------------------------------------------------


def require_arrow() -> Any:
    """pyarrow; an ImportError that says what to install if there is none."""
    try:
        import pyarrow as pa
    except ImportError as error:
        message = "tables need pyarrow: pip install 'llamastate[tables]'"
        raise ImportError(message, name="pyarrow") from error
    return pa


def _is_table_like(given: Any) -> bool:
    return is_table(given) or (hasattr(given, "schema") and hasattr(given, "to_batches"))


class _TableSource(Source):
    """Lines made of the rows of a table."""

    def __init__(self, given: Any) -> None:
        require_arrow()
        if is_table(given):
            super().__init__(given)
        else:
            self._given, self.path = given, None
        self.schema: pa.Schema = None
        for _ in self.batches():
            break

    @property
    def again(self) -> bool:
        return True

    @property
    def stamp(self) -> list[int] | None:
        return None if self.path is None else super().stamp

    def count(self) -> int | None:
        if self.path is None:
            return int(self._given.num_rows)
        if self.path.lower().endswith(_PARQUET):
            import pyarrow.parquet as pq

            return int(pq.read_metadata(self.path).num_rows)
        return None

    def lines(self) -> Iterator[tuple[int, bytes | Line]]:
        i = 0
        for batch in self.batches():
            for row in batch.select([n for n in batch.schema.names if n in _READ]).to_pylist():
                yield i + 1, row_line(row, i)
                i += 1

    def batches(self) -> Iterator[Any]:
        """A few rows at a time."""
        with _loading(str(self.path)):
            yield from self._batches()

    def _batches(self) -> Iterator[Any]:
        pa = require_arrow()
        if self.path is None:
            self.schema = self._given.schema
            yield from self._given.to_batches(max_chunksize=_ROWS)
        elif self.path.lower().endswith(_PARQUET):
            import pyarrow.parquet as pq

            with pq.ParquetFile(self.path) as file:
                self.schema = file.schema_arrow
                yield from file.iter_batches(batch_size=_ROWS)
        else:
            with pa.memory_map(self.path) as file:
                try:
                    reader = pa.ipc.open_file(file)
                    batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
                except pa.ArrowInvalid:
                    file.seek(0)
                    batches = reader = pa.ipc.open_stream(file)
                self.schema = reader.schema
                for batch in batches:
                    for start in range(0, batch.num_rows, _ROWS):
                        yield batch.slice(start, _ROWS)


class _Spooled(Source):
    """Lines that come once, kept in a file without a name to be read again."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115
        self._whole = False

    def lines(self) -> Iterator[tuple[int, bytes | Line]]:
        if self._whole:
            self._spool.seek(0)
            while head := self._spool.read(16):
                number, size = struct.unpack("<QQ", head)
                yield number, self._spool.read(size)
            return
        for number, raw in super().lines():
            assert isinstance(raw, bytes)
            try:
                self._spool.write(struct.pack("<QQ", number, len(raw)) + raw)
                self._spool.flush()
            except OSError as error:
                raise StoreFullError(f"there is no room for temporary files: {error}", path=None) from error
            yield number, raw
        self._whole = True

    def close(self) -> None:
        """Give the room back."""
        self._spool.close()


_READ = frozenset(("custom_id", "sampling_params", *ASKING))


@contextlib.contextmanager
def _loading(path: str) -> Iterator[None]:
    pa = require_arrow()
    try:
        yield
    except pa.ArrowException as error:
        raise LoadError(f"{path!r} cannot be read as a table: {error}", path=path, reason=str(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileAccessError(f"cannot read {path!r}: {reason}", path=path, reason=reason, code=error.errno) from error


def _mark(fields: Iterable[Any]) -> bytes:
    return hashlib.blake2b("\0".join(field.name for field in fields).encode(), digest_size=8).hexdigest().encode()


def _require_ours(path: str, results: str) -> None:
    """Refuse to replace a table that was not written here, or to which somebody has added columns since."""
    if os.path.isdir(path):
        raise SaveError(f"cannot write {path!r}: it is a folder", path=path, reason="a folder")
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    begun = False
    with contextlib.suppress(OSError), open(results, "rb") as file:
        begun = read_record(next((line for line in file if line.strip()), b"")) is not None
    try:
        schema = _TableSource(path).schema
    except LoadError:
        ours = begun
    else:
        mark = (schema.metadata or {}).get(_MARK)
        ours = mark == _mark(schema) if mark is not None else begun and set(COLUMNS) <= set(schema.names)
    if not ours:
        raise CorruptStateError(
            f"{path!r} is a table that was not written by this command; name another output, or move it away",
            path=path, reason="no table of ours",
        )  # fmt: skip


def _write_table(source: Source, results: str, path: str) -> None:
    """Put results beside the rows that asked for them."""
    pa = require_arrow()
    kinds = {"floats": pa.list_(pa.float32())}
    added = [pa.field(name, kinds.get(kind) or pa.type_for_alias(kind)) for name, kind in COLUMNS.items()]
    before = source.schema if isinstance(source, _TableSource) else pa.schema([("custom_id", pa.string())])
    kept = [field for field in before if field.name not in COLUMNS]
    schema = pa.schema([*kept, *added]).with_metadata({_MARK: _mark([*kept, *added])})
    folder, name = os.path.split(path)
    with contextlib.closing(_Results(results)) as found:

        def filled() -> Iterator[Any]:
            for columns, lines in _read_again(source, kept):
                rows = [found.get(line) for line in lines]
                arrays = [pa.array([row[field.name] for row in rows], field.type) for field in added]
                yield pa.RecordBatch.from_arrays([*columns, *arrays], schema=schema)

        try:
            fd, temporary = tempfile.mkstemp(prefix=f".{name[:200]}.", suffix=".tmp", dir=folder)
            try:
                with os.fdopen(fd, "wb") as file:
                    _write_batches(file, schema, filled(), parquet=path.lower().endswith(_PARQUET))
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_umask())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            fsync_folder(folder)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise SaveError(
                f"cannot write {path!r}: {reason}; the results are in {results!r}", path=path, reason=reason
            ) from error


def _umask() -> int:
    # there is no way to ask for it alone
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_batches(file: Any, schema: Any, batches: Iterator[Any], *, parquet: bool) -> None:
    if parquet:
        import pyarrow.parquet as pq

        writer = pq.ParquetWriter(file, schema)
    else:
        writer = require_arrow().ipc.new_file(file, schema)
    with writer:
        for batch in batches:
            writer.write_batch(batch)


def _read_again(source: Source, kept: list[Any]) -> Iterator[tuple[list[Any], list[bytes]]]:
    """Columns that stay, a few rows at a time, with the names that their results go by."""
    pa = require_arrow()
    with contextlib.closing(Placing(source)) as placing:
        placed = placing.lines()
        if isinstance(source, _TableSource):
            for batch in source.batches():
                yield [batch.column(field.name) for field in kept], [next(placed)[1] for _ in range(batch.num_rows)]
            return
        while chunk := [pair for _, pair in zip(range(_ROWS), placed, strict=False)]:
            ids = pa.array([line.custom_id for line, _ in chunk], pa.string())
            yield [ids], [name for _, name in chunk]


class _Results:
    """Results by name: where each is in the file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("CREATE TABLE lines (name BLOB PRIMARY KEY, start INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")
        start = 0
        for line in self._file:
            record = read_record(line)
            if record is not None:
                self._db.execute("INSERT OR REPLACE INTO lines VALUES (?, ?)", (record.name, start))
            start += len(line)

    def get(self, name: bytes) -> dict[str, Any]:
        found = self._db.execute("SELECT start FROM lines WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise BatchChangedError(
                f"{self._file.name!r} has no result for a row: the input has changed since it was read",
                path=self._file.name, field="input",
            )  # fmt: skip
        self._file.seek(found[0])
        return columns_of(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self._db.close()
