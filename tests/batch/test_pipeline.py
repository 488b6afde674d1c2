"""Files in, files out: everything is answered once, whatever was there, whatever goes wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from llamastate.batch import BatchRunner, Defaults, openai, pipeline, run_batch
from llamastate.errors import (
    BatchChangedError,
    CorruptStateError,
    FileAccessError,
    InvalidArgumentError,
    OutputMovedError,
    StateFileNotFoundError,
    StoreFullError,
    StoreLockedError,
)
from tests import children
from tests.batch.lines import by_id, chat, code, line, read, text, write
from tests.helpers import model

COMMON = "the and of to in is that it for was "


def prompts(n: int, **body: Any) -> list[bytes]:
    body.setdefault("max_tokens", 5)
    return [chat(f"r{i}", COMMON + str(i), **body) for i in range(n)]


def stripped(path: Path) -> dict[str, Any]:
    """Results without what may differ: when, and how much was shared."""
    found = by_id(path)
    for record in found.values():
        if record["response"]:
            del record["response"]["body"]["created"], record["response"]["body"]["usage"]["prompt_tokens_details"]
    return found


def test_everything_is_answered_once(runner: BatchRunner, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in", [*prompts(20), b"\n", line("c", prompt=["the", "of"], n=2, max_tokens=3, logprobs=1)]
    )
    seen: list[int] = []
    summary = run_batch(source, tmp_path / "out", runner=runner, on_progress=lambda p: seen.append(p.done))
    found = by_id(tmp_path / "out")
    assert set(found) == {*(f"r{i}" for i in range(20)), "c"}
    assert seen == list(range(22))
    assert (summary.completed, summary.failed, summary.skipped, summary.unfinished) == (21, 0, 0, 0)
    assert summary.stopped is None
    assert summary.cached_tokens > 0.5 * summary.prompt_tokens
    choices = found["c"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in choices)
    assert found["r0"]["response"]["body"]["usage"]["completion_tokens"] <= 5
    assert json.loads(json.dumps(summary.to_dict()))["prefix_hit_rate"] == summary.hit_rate
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "out.journal"]


def test_again_is_nothing_to_do(runner: BatchRunner, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [*prompts(5), b"rubbish\n", b"rubbish\n", *prompts(1)])
    first = run_batch(source, tmp_path / "out", runner=runner)
    before = (tmp_path / "out").read_bytes()
    again = run_batch(source, tmp_path / "out", runner=runner)
    assert (tmp_path / "out").read_bytes() == before
    assert (first.completed, first.failed) == (5, 3)
    assert (again.completed, again.failed, again.skipped, again.errors_before) == (0, 0, 8, 3)
    anew = run_batch(source, tmp_path / "out", runner=runner, resume=False)
    assert (anew.completed, anew.failed, anew.skipped) == (5, 3, 0)


def test_more_lines_later(runner: BatchRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / "in", prompts(5))
    run_batch(tmp_path / "in", out, runner=runner)
    write(tmp_path / "in", reversed(prompts(8)))  # in any order
    assert run_batch(tmp_path / "in", out, runner=runner).completed == 3
    assert len(by_id(out)) == 8


def test_a_line_that_was_taken_out_is_done_again(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(5)), tmp_path / "out"
    run_batch(source, out, runner=runner)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:1] + lines[:0:-2]))  # also sorted otherwise
    run_batch(source, out, runner=runner)
    assert len(by_id(out)) == 5


def test_errors_stay_with_their_requests(runner: BatchRunner, tmp_path: Path) -> None:
    bad = [
        (b"{", None, "invalid_json"),
        (b'{"custom_id":"\xff"}', None, "invalid_utf8"),
        (line("nowhere", "/v1/x"), "nowhere", "invalid_url"),
        (line("long", prompt=COMMON * 1000), "long", "context_length_exceeded"),
        (line("empty", prompt=""), "empty", "invalid_parameter"),
        (line("grammar", prompt="x", grammar="root ::= ("), "grammar", "invalid_parameter"),
        (line("bias", prompt="x", logit_bias={"99999": 1}), "bias", "invalid_parameter"),
        (line("token", prompt=[99999]), "token", "tokenize"),
        (line("one bad", prompt=["x", "x" * 10**5]), "one bad", "context_length_exceeded"),
        (line("schema", prompt="x", response_format={"type": "json_schema", "json_schema": {"schema": 3}}), "schema",
         "invalid_parameter"),
        (chat("r1", "again"), None, "duplicate_custom_id"),
    ]  # fmt: skip
    good = [*prompts(4), line("zero", prompt="the of", max_tokens=0)]
    source = write(tmp_path / "in", [*good, *(raw.rstrip(b"\n") + b"\n" for raw, _, _ in bad)])
    summary = run_batch(source, tmp_path / "out", runner=runner)
    assert (summary.completed, summary.failed) == (5, len(bad))
    found = read(tmp_path / "out")
    errors = [(record["custom_id"], code(record)) for record in found if record["error"]]
    assert sorted(errors, key=str) == sorted(((name, word) for _, name, word in bad), key=str)
    assert text(by_id(tmp_path / "out")["zero"]) == ""
    assert next(r["error"]["line"] for r in found if r["error"] and r["error"]["code"] == "duplicate_custom_id") == 16


def test_a_schema_is_kept(runner: BatchRunner, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 5}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    write(tmp_path / "in", prompts(6, response_format=form, max_tokens=40))
    run_batch(tmp_path / "in", tmp_path / "out", runner=runner)
    for record in by_id(tmp_path / "out").values():
        assert 0 <= json.loads(text(record))["a"] <= 5


def test_embeddings(runner: BatchRunner, tmp_path: Path) -> None:
    url = "/v1/embeddings"
    write(tmp_path / "in", [
        line("a", url, input=["the of", "and"]), line("b", url, input="the of", encoding_format="base64"), *prompts(2),
    ])  # fmt: skip
    run_batch(tmp_path / "in", tmp_path / "out", runner=runner)
    found = by_id(tmp_path / "out")
    first, second = (np.array(e["embedding"], np.float32) for e in found["a"]["response"]["body"]["data"])
    again = np.frombuffer(base64.b64decode(found["b"]["response"]["body"]["data"][0]["embedding"]), "<f4")
    assert first.shape == again.shape == (runner.model.n_embd_out,)
    np.testing.assert_allclose(first, again, atol=1e-3)
    assert abs(np.linalg.norm(second) - 1) < 1e-3
    assert found["a"]["response"]["body"]["usage"]["prompt_tokens"] > 3


def test_errors_are_tried_again(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write(source, [*prompts(3), b"rubbish\n", chat("x", "y", best_of=1)])
    assert run_batch(source, out, runner=runner).failed == 2
    write(source, [*prompts(3), chat("x", "y", max_tokens=2)])
    with pytest.raises(BatchChangedError) as caught:  # its body is another one now
        run_batch(source, out, runner=runner)
    assert (caught.value.field, caught.value.custom_ids) == ("body", ("x",))
    summary = run_batch(source, out, runner=runner, retry_errors=True)
    assert (summary.completed, summary.skipped, summary.errors_before) == (1, 3, 0)
    assert [record["error"] for record in read(out)] == [None] * 4


def test_a_changed_body_is_told_or_done_again(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(6)), tmp_path / "out"
    run_batch(source, out, runner=runner)
    before = out.read_bytes()
    write(source, [*prompts(4), *prompts(6, max_tokens=2)[4:]])
    for given in (source, io.BytesIO(source.read_bytes())):
        with pytest.raises(BatchChangedError) as caught:
            run_batch(given, out, runner=runner)
        assert caught.value.custom_ids[0] == "r4"
        assert out.read_bytes() == before
    with pytest.raises(InvalidArgumentError):
        run_batch(io.BytesIO(source.read_bytes()), out, runner=runner, on_change="redo")
    assert run_batch(source, out, runner=runner, on_change="redo").completed == 2
    assert len(by_id(out)) == 6


def test_a_changed_run_is_told_or_done_again(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(3)), tmp_path / "out"
    run_batch(source, out, runner=runner)
    before = out.read_bytes()
    with pytest.raises(BatchChangedError) as caught:
        run_batch(source, out, runner=runner, defaults=Defaults(seed=1))
    assert (caught.value.field, caught.value.expected, caught.value.found) == ("seed", 0, 1)
    assert out.read_bytes() == before
    (tmp_path / "out.journal").unlink()  # then only the digest is known
    with pytest.raises(BatchChangedError) as caught:
        run_batch(source, out, runner=runner, defaults=Defaults(seed=1))
    assert caught.value.field == "run"
    assert run_batch(source, out, runner=runner).skipped == 3
    assert run_batch(source, out, runner=runner, defaults=Defaults(seed=1), on_change="redo").completed == 3
    assert len(by_id(out)) == 3


def test_results_do_not_depend_on_where_it_was_interrupted(runner: BatchRunner, tmp_path: Path) -> None:
    source = write(tmp_path / "in", prompts(12, max_tokens=8, temperature=0.0))
    run_batch(source, tmp_path / "whole", runner=runner)
    stopping = Stopper(runner, 4)
    summary = run_batch(source, tmp_path / "parts", runner=runner, on_progress=stopping)
    assert summary.stopped == "stop"
    assert summary.completed + summary.unfinished <= 12
    run_batch(source, tmp_path / "parts", runner=runner)
    assert stripped(tmp_path / "parts") == stripped(tmp_path / "whole")


class Stopper:
    def __init__(self, runner: BatchRunner, after: int) -> None:
        self.runner, self.after = runner, after

    def __call__(self, progress: Any) -> None:
        if progress.done == self.after:
            self.runner.stop()


def test_inputs_of_every_kind(runner: BatchRunner, tmp_path: Path) -> None:
    lines = prompts(3)
    for i, given in enumerate(
        (
            io.BytesIO(b"".join(lines)),
            lines,
            [raw.decode() for raw in lines],
            map(json.loads, lines),
            str(tmp_path / "in"),
        )
    ):
        write(tmp_path / "in", [b"\xef\xbb\xbf", *lines])
        assert run_batch(given, tmp_path / f"out{i}", runner=runner).completed == 3
    out = io.BytesIO()
    assert run_batch(lines, out, runner=runner).completed == 3
    assert len(out.getvalue().splitlines()) == 3
    with pytest.raises(InvalidArgumentError):
        run_batch([object()], tmp_path / "x", runner=runner)


def test_inputs_that_are_not_there(runner: BatchRunner, tmp_path: Path) -> None:
    for given, kind in (
        (tmp_path / "none", StateFileNotFoundError),
        (tmp_path, FileAccessError),
        ("\0", FileAccessError),
    ):
        with pytest.raises(kind):
            run_batch(given, tmp_path / "out", runner=runner)
    write(tmp_path / "in", prompts(1))
    with pytest.raises(FileAccessError):
        run_batch(tmp_path / "in", tmp_path / "in" / "out", runner=runner)
    with pytest.raises(InvalidArgumentError):
        run_batch(tmp_path / "in", tmp_path / "out", runner=runner, n_ctx=5)
    with pytest.raises(InvalidArgumentError):
        run_batch(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InvalidArgumentError):
        run_batch(tmp_path / "in", tmp_path / "out", runner=runner, on_change="ignore")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tail", [b'{"id":"batch_req_', b"\0" * 4096, b'{"id":1}\0\0\n'])
def test_a_torn_end_is_repaired(runner: BatchRunner, tmp_path: Path, tail: bytes) -> None:
    source, out = write(tmp_path / "in", prompts(4)), tmp_path / "out"
    run_batch(source, out, runner=runner)
    lines = out.read_bytes().splitlines(keepends=True)
    for keep in (3, 0):
        out.write_bytes(b"".join(lines[:keep]) + tail)
        assert run_batch(source, out, runner=runner).skipped == keep
        assert len(by_id(out)) == 4


def test_every_length_of_a_torn_line(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(2, max_tokens=1)), tmp_path / "out"
    run_batch(source, out, runner=runner)
    first, second = out.read_bytes().splitlines(keepends=True)
    for end in range(0, len(second), 7):
        out.write_bytes(first + second[:end])
        assert run_batch(source, out, runner=runner).completed == 1
        assert len(by_id(out)) == 2


@pytest.mark.parametrize("content", [b"notes\n", b'{"custom_id":"a","id":"1","response":null,"error":null}\n', b"x"])
def test_files_of_others_are_left_alone(runner: BatchRunner, tmp_path: Path, content: bytes) -> None:
    source, out = write(tmp_path / "in", prompts(2)), tmp_path / "out"
    out.write_bytes(content)
    with pytest.raises(CorruptStateError) as caught:
        run_batch(source, out, runner=runner)
    assert caught.value.section == "line 1"
    assert out.read_bytes() == content
    out.unlink()
    run_batch(source, out, runner=runner)
    data = out.read_bytes()
    out.write_bytes(data + content.rstrip(b"\n") + b"\n")
    with pytest.raises(CorruptStateError):
        run_batch(source, out, runner=runner)


def test_two_runs_on_one_output(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(3)), tmp_path / "out"
    (tmp_path / "link").symlink_to("out")

    def another(_: Any) -> None:
        for path in (out, tmp_path / "link"):
            with pytest.raises(StoreLockedError):
                run_batch(source, path, runner=runner)

    assert run_batch(source, out, runner=runner, on_progress=another).completed == 3
    assert run_batch(source, tmp_path / "link", runner=runner).skipped == 3


def test_another_process_on_one_output(runner: BatchRunner, tmp_path: Path) -> None:
    script = """
import sys
from llamastate.batch.outfile import OutputFile
out = OutputFile(sys.argv[1], {})
print("held", flush=True)
sys.stdin.read()
"""
    source, out = write(tmp_path / "in", prompts(3)), tmp_path / "out"
    with children.start(script, out) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreLockedError):
            run_batch(source, out, runner=runner)
        other.kill()
        other.communicate()
    assert run_batch(source, out, runner=runner).completed == 3


def moved(out: Path, how: Callable[[Path], None], after: int) -> Callable[[Any], None]:
    def act(progress: Any) -> None:
        if progress.done == after:
            how(out)
        if progress.done >= after:
            time.sleep(0.02)  # until somebody has looked

    return act


def _replace(out: Path) -> None:
    out.rename(f"{out}.old")
    out.write_bytes(b"")


@pytest.mark.parametrize("how", [lambda out: out.rename(f"{out}.old"), _replace], ids=["moved", "replaced"])
def test_an_output_that_is_moved_away(runner: BatchRunner, tmp_path: Path, how: Callable[[Path], None]) -> None:
    source, out = write(tmp_path / "in", prompts(40)), tmp_path / "out"
    with pytest.raises(OutputMovedError) as caught:
        run_batch(source, out, runner=runner, sync_seconds=0.001, on_progress=moved(out, how, 3))
    written = by_id(Path(f"{out}.old"))
    assert caught.value.n_results == len(written) >= 3
    if not out.exists():
        with pytest.raises(OutputMovedError):  # where are they?
            run_batch(source, out, runner=runner)
    Path(f"{out}.old").rename(out)
    summary = run_batch(source, out, runner=runner)
    assert summary.skipped == len(written)
    assert len(by_id(out)) == 40


_FULL = """
import resource, signal, sys
from llamastate.batch import BatchRunner, run_batch
from llamastate.errors import StoreFullError
from tests.helpers import model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with BatchRunner(model("dense", vocab="spm"), n_parallel=8, n_ctx=2048, n_threads=1) as runner:
    for size in (0, 100, 3000, 9001, 12345):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            run_batch(sys.argv[1], sys.argv[2], runner=runner)
        except StoreFullError as error:
            assert error.path.startswith(sys.argv[2]), error.path
            print("full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(run_batch(sys.argv[1], sys.argv[2], runner=runner).skipped)
"""


def test_a_full_disk(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(40)), tmp_path / "out"
    done = children.run(_FULL, source, out)
    assert done.returncode == 0, done.stderr
    *full, skipped = done.stdout.split()
    assert full == ["full"] * 5
    assert 10 < int(skipped) < 40
    run_batch(source, tmp_path / "whole", runner=runner)
    assert by_id(out).keys() == by_id(tmp_path / "whole").keys()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_is_full(runner: BatchRunner, tmp_path: Path) -> None:
    source = write(tmp_path / "in", prompts(2))
    with pytest.raises(StoreFullError):
        run_batch(source, "/dev/full", runner=runner)
    assert not os.path.exists("/dev/full.journal")


def test_memory_is_flat(runner: BatchRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def rows() -> Iterator[bytes]:
        for i in range(12_000):
            yield line(f"request number {i}", prompt="the", max_tokens=0)

    sizes: list[int] = []

    def measure(progress: Any) -> None:
        if progress.done and progress.done % 2000 == 0:
            sizes.append(psutil.Process().memory_info().rss)

    assert run_batch(rows(), out, runner=runner, on_progress=measure).completed == 12_000
    assert sizes[-1] - sizes[1] < 16 << 20
    assert run_batch(rows(), out, runner=runner).skipped == 12_000
    assert psutil.Process().memory_info().rss - sizes[1] < 32 << 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_good_order(runner: BatchRunner, tmp_path: Path, number: int) -> None:
    source, out = write(tmp_path / "in", prompts(40)), tmp_path / "out"
    before = signal.getsignal(number)

    def act(progress: Any) -> None:
        if progress.done == 3:
            os.kill(os.getpid(), number)

    summary = run_batch(source, out, runner=runner, on_progress=act, handle_signals=True)
    assert summary.stopped == signal.Signals(number).name
    assert 3 <= summary.completed < 40
    assert summary.unfinished > 0
    assert signal.getsignal(number) is before
    assert run_batch(source, out, runner=runner, handle_signals=True).skipped == summary.completed
    assert len(by_id(out)) == 40
    events = [json.loads(raw) for raw in (tmp_path / "out.journal").read_bytes().splitlines()]
    assert [e["reason"] for e in events if e.get("event") == "stop"] == [summary.stopped, "done"]


def test_an_exception_of_the_callers_loses_nothing(runner: BatchRunner, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", prompts(10)), tmp_path / "out"

    def act(progress: Any) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(source, out, runner=runner, on_progress=act)
    assert len(by_id(out)) == 3
    assert run_batch(source, out, runner=runner).skipped == 3
    assert threading.active_count() == 1 or not any("batch-sync" in t.name for t in threading.enumerate())


def test_an_unforeseen_error_is_its_requests(runner: BatchRunner, tmp_path: Path, monkeypatch: Any) -> None:
    deep = {"function": {"name": "f", "arguments": "[" * 50_000 + "]" * 50_000}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [deep]}]
    part = {"type": "object", "required": ["a"]}
    parts = [{**part, "properties": []}, {**part, "properties": {"a": {"const": 1}}}]
    form = {"type": "json_schema", "json_schema": {"schema": {"oneOf": parts}}}
    source = write(tmp_path / "in", [
        *prompts(3), line("deep", "/v1/chat/completions", messages=messages),
        line("schema", prompt="x", response_format=form),
        line("unforeseen", prompt="x", user="unforeseen"), line("answer", prompt="x", max_tokens=1),
    ])  # fmt: skip
    completion, response = openai._completion, pipeline.response_line

    def parsing(given: Any, *more: Any) -> Any:
        return 1 // 0 if given.custom_id == "unforeseen" else completion(given, *more)

    def writing(key: str, query: Any, *more: Any) -> bytes:
        return {}[key] if query.line.custom_id == "answer" else response(key, query, *more)

    monkeypatch.setattr(openai, "_completion", parsing)
    monkeypatch.setattr(pipeline, "response_line", writing)
    summary = run_batch(source, tmp_path / "out", runner=runner)
    codes = {name: code(record) for name, record in by_id(tmp_path / "out").items() if record["error"]}
    assert codes == {
        "deep": "invalid_parameter", "schema": "unsupported_parameter", "unforeseen": "internal", "answer": "internal",
    }  # fmt: skip
    assert "ZeroDivisionError" in by_id(tmp_path / "out")["unforeseen"]["error"]["message"]
    assert summary.completed == 3
    assert summary.errors == {"invalid_parameter": 1, "unsupported_parameter": 1, "internal": 2}
    assert summary.first_error is not None


def test_names_that_no_json_can_hold(runner: BatchRunner, tmp_path: Path) -> None:
    source = write(tmp_path / "in", prompts(1))
    run_batch(source, os.fsencode(tmp_path) + b"/o\xff", runner=runner, model_name="m\udcff")
    (record,) = read(Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")))
    assert record["response"]["body"]["model"] == "m\\udcff"


def test_what_may_change_between_runs(tmp_path: Path) -> None:
    made = model("dense", vocab="spm")
    source, out = write(tmp_path / "in", prompts(2)), tmp_path / "out"
    for n_parallel, done in ((2, 2), (3, 0)):
        with BatchRunner(made, n_parallel=n_parallel, n_ctx=1024, n_threads=1, fixed_shapes=True) as one:
            assert run_batch(source, out, runner=one).completed == done
    with BatchRunner(made, n_parallel=2, n_ctx=1024, n_threads=1) as other, pytest.raises(BatchChangedError) as caught:
        run_batch(source, out, runner=other)
    assert (caught.value.field, caught.value.expected, caught.value.found) == ("fixed_shapes", True, False)


def test_what_had_no_room_is_tried_again(tmp_path: Path) -> None:
    made = model("dense", vocab="spm")
    source, out = write(tmp_path / "in", [
        chat("short", "the", max_tokens=3, ignore_eos=True), chat("long", "the", max_tokens=400, ignore_eos=True),
        chat("quotes", 'say "stop_reason":"full"', max_tokens=3),
    ]), tmp_path / "out"  # fmt: skip
    with BatchRunner(made, n_parallel=2, n_ctx=256, n_threads=1) as small:
        first = run_batch(source, out, runner=small)
    assert (first.completed, first.full) == (3, 1)
    choice = by_id(out)["long"]["response"]["body"]["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "full")
    assert "stop_reason" not in by_id(out)["short"]["response"]["body"]["choices"][0]
    with BatchRunner(made, n_parallel=2, n_ctx=1024, n_threads=1) as large:
        again = run_batch(source, out, runner=large)
        assert (again.skipped, again.full) == (3, 1)
        again = run_batch(source, out, runner=large, retry_errors=True)
        assert (again.completed, again.skipped, again.full) == (1, 2, 0)
    assert by_id(out)["long"]["response"]["body"]["usage"]["completion_tokens"] == 400


def test_a_model_by_its_path(tmp_path: Path, tiny_path: Callable[..., Path]) -> None:
    source = write(tmp_path / "in", prompts(3))
    summary = run_batch(
        source, tmp_path / "out", model=tiny_path("dense", vocab="spm"), n_parallel=4, n_ctx=1024, n_threads=1,
        model_name="mine",
    )  # fmt: skip
    assert summary.completed == 3
    assert {r["response"]["body"]["model"] for r in read(tmp_path / "out")} == {"mine"}
