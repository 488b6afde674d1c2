"""Rows instead of lines: dicts, Parquet and Arrow files. Needs the extra ``tables``, but for dicts.

A row asks by one of the columns ``messages`` (a list of role and content, or JSON), ``prompt`` (text),
``tokenized_prompt`` (token ids) or ``input`` (text to embed). ``sampling_params`` (a struct, or JSON) has the rest, by
the names of OpenAI's and vLLM's APIs; ``custom_id`` is the number of the row where there is none. The row comes back
with these columns added:

=======================  ===========================================================================================
``generated_text``       the first output
``finish_reason``        its end: ``stop`` or ``length``
``num_input_tokens``     of the prompt
``num_cached_tokens``    those of them that were not computed for this row
``num_generated_tokens`` of all outputs
``embedding``            the vector, if one was asked for
``request_id``           of the result, made of what was asked and of the run
``response``             the whole response as JSON: further outputs, log probabilities
``__inference_error__``  None, or what went wrong: "Type: message"
=======================  ===========================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llamastate.atomic import fsync_folder
from llamastate.batch.journal import key_of, run_digest
from llamastate.batch.openai import Defaults, parse, read_line
from llamastate.batch.pipeline import BatchSummary, Pending, facts_of, names_of, run_batch
from llamastate.batch.request import Malformed, Request
from llamastate.batch.responses import error_line, response_line
from llamastate.batch.resume import Placing
from llamastate.batch.source import Source
from llamastate.errors import FileAccessError, InvalidRequestError, LoadError, SaveError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["is_table", "run_rows", "run_table"]

_PARQUET = (".parquet", ".pq")
_ARROW = (".arrow", ".feather", ".ipc")
#: Rows that are in memory at once.
_ROWS = 256
_ASKING = ("messages", "prompt", "tokenized_prompt", "input")


def is_table(path: Any) -> bool:
    """Whether a path names a table, by its ending."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith((*_PARQUET, *_ARROW))


def run_rows(rows: Iterable[Mapping[str, Any]], runner: Any, *, defaults: Defaults | None = None,
             model_name: str | None = None) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Answer rows: no file, no journal.

    Parameters
    ----------
    rows : iterable of mapping
        Read as they are needed.
    runner : BatchRunner
    defaults : Defaults, optional
        For rows that do not say.
    model_name : str, optional
        For the responses.

    Yields
    ------
    dict
        The row with the columns above added, as soon as it is done: in any order.
    """
    defaults, names = defaults or Defaults(), names_of(runner, model_name)
    run = run_digest(facts_of(runner, defaults))

    def requests() -> Iterator[Request | Malformed]:
        for i, row in enumerate(rows):
            line = read_line(_line(row, i), i + 1)
            key = key_of(line, run).id
            try:
                if line.error is not None:
                    raise line.error
                query = parse(line, defaults)
            except InvalidRequestError as error:
                yield Malformed(str(line.custom_id), error, (row, error_line(key, line, error)))
                continue
            yield from query.requests((row, Pending(key, query)))

    for result in runner.run(requests()):
        if isinstance(result.meta[1], bytes):
            yield _joined(*result.meta)
            continue
        (row, pending), i = result.meta
        if pending.put(i, result):
            query = pending.query
            yield _joined(
                row,
                response_line(pending.key, query, pending.results, names)
                if pending.error is None
                else error_line(pending.key, query.line, pending.error),
            )


def run_table(input: Any, output: str | os.PathLike[str], **options: Any) -> BatchSummary:  # noqa: A002
    """Answer every row of a table, and be able to go on wherever it was ended.

    Parameters
    ----------
    input : path-like or pyarrow.Table
        ``.parquet``, ``.arrow`` (file or stream), or lines of OpenAI's batch format.
    output : path-like
        ``.parquet`` or ``.arrow``: written when everything is done, in the order of the input, atomically; until then
        results are in ``<output>.results.jsonl``, and that is what is gone on from. Anything else gets the lines
        themselves.
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
    ImportError
        ``pyarrow`` is not installed.

    Notes
    -----
    Errors besides these are those of :func:`~llamastate.batch.run_batch`. Memory does not grow with the table.
    """
    source = _TableSource(input) if _is_table_like(input) else Source(input)
    if not is_table(output):
        return run_batch(source, output, **options)
    path = os.path.realpath(os.fspath(output))
    results = f"{path}.results.jsonl"
    summary = run_batch(source, results, **options)
    if summary.stopped is None:
        _write_table(source, results, path)
    return summary


# --- rows -------------------------------------------------------------------------------------------------------------


def _line(row: Mapping[str, Any], i: int) -> bytes:
    """A row as a line. What is wrong with it is found when that is read."""
    custom_id = row.get("custom_id")
    body = _decoded(row.get("sampling_params")) or {}
    body = {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body
    asked = [name for name in _ASKING if row.get(name) is not None]
    url = "/v1/completions"
    if isinstance(body, dict):
        if "messages" in asked:
            url = "/v1/chat/completions"
            messages = _decoded(row["messages"])
            body["messages"] = _without_nulls(messages) if isinstance(messages, list) else messages
            if isinstance(body.get("logprobs"), int) and not isinstance(body["logprobs"], bool):
                # vLLM's parameters have a number here, OpenAI's chats have two fields
                body["top_logprobs"], body["logprobs"] = body["logprobs"], True
        elif "tokenized_prompt" in asked:
            body["prompt"] = list(row["tokenized_prompt"])
        elif "prompt" in asked:
            body["prompt"] = row["prompt"]
        elif "input" in asked:
            url, body["input"] = "/v1/embeddings", row["input"]
    line = {"custom_id": str(i) if custom_id is None else str(custom_id), "url": url, "body": body}
    try:
        return json.dumps(line, default=_plain).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, AttributeError, RecursionError):
        return json.dumps({"custom_id": line["custom_id"]}).encode()


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as Python's."""
    return value.tolist()


def _decoded(value: Any) -> Any:
    if not isinstance(value, (str, bytes)):
        return dict(value) if isinstance(value, Mapping) else value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nulls(messages: list[Any]) -> list[Any]:
    """In a table every message has the fields of all."""
    return [
        {name: value for name, value in message.items() if value is not None or name == "content"}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]


def _added(written: bytes) -> dict[str, Any]:
    """The columns that a line of output stands for."""
    record = json.loads(written)
    row: dict[str, Any] = dict.fromkeys(_TYPES)
    row["request_id"] = record["id"]
    if record["error"] is not None:
        row["__inference_error__"] = f"{record['error']['type']}: {record['error']['message']}"
        return row
    body = record["response"]["body"]
    usage = body["usage"]
    row["num_input_tokens"] = usage["prompt_tokens"]
    row["num_cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
    row["num_generated_tokens"] = usage.get("completion_tokens")
    if "data" in body:
        row["embedding"] = body["data"][0]["embedding"]
        return row
    choice = body["choices"][0]
    row["generated_text"] = choice["text"] if "text" in choice else choice["message"]["content"]
    row["finish_reason"] = choice["finish_reason"]
    row["response"] = json.dumps(body, ensure_ascii=False)
    return row


def _joined(row: Mapping[str, Any], written: bytes) -> dict[str, Any]:
    return {**row, **_added(written)}


# --- tables -----------------------------------------------------------------------------------------------------------

_TYPES = {
    "generated_text": "string",
    "finish_reason": "string",
    "num_input_tokens": "int64",
    "num_cached_tokens": "int64",
    "num_generated_tokens": "int64",
    "embedding": "floats",
    "request_id": "string",
    "response": "string",
    "__inference_error__": "string",
}


def _arrow() -> Any:
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
        super().__init__(given)
        _arrow()
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

    def lines(self) -> Iterator[tuple[int, bytes]]:
        i = 0
        for batch in self.batches():
            for row in batch.select([n for n in batch.schema.names if n in _READ]).to_pylist():
                yield i + 1, _line(row, i)
                i += 1

    def batches(self) -> Iterator[Any]:
        """A few rows at a time."""
        with _loading(str(self.path)):
            yield from self._batches()

    def _batches(self) -> Iterator[Any]:
        pa = _arrow()
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


_READ = frozenset(("custom_id", "sampling_params", *_ASKING))


@contextlib.contextmanager
def _loading(path: str) -> Iterator[None]:
    pa = _arrow()
    try:
        yield
    except pa.ArrowException as error:
        raise LoadError(f"{path!r} cannot be read as a table: {error}", path=path, reason=str(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileAccessError(f"cannot read {path!r}: {reason}", path=path, reason=reason, code=error.errno) from error


def _write_table(source: Source, results: str, path: str) -> None:
    """Put results beside the rows that asked for them."""
    pa = _arrow()
    kinds = {"floats": pa.list_(pa.float32())}
    added = [pa.field(name, kinds.get(kind) or pa.type_for_alias(kind)) for name, kind in _TYPES.items()]
    before = source.schema if isinstance(source, _TableSource) else pa.schema([("custom_id", pa.string())])
    kept = [field for field in before if field.name not in _TYPES]
    schema = pa.schema([*kept, *added])
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
        writer = _arrow().ipc.new_file(file, schema)
    with writer:
        for batch in batches:
            writer.write_batch(batch)


def _read_again(source: Source, kept: list[Any]) -> Iterator[tuple[list[Any], list[bytes]]]:
    """Columns that stay, a few rows at a time, with the names that their results go by."""
    pa = _arrow()
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
        from llamastate.batch.journal import read_record

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
        (start,) = self._db.execute("SELECT start FROM lines WHERE name = ?", (name,)).fetchone()
        self._file.seek(start)
        return _added(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self._db.close()
