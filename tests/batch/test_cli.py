"""``llamastate run-batch`` as a process."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llamastate.batch import BatchMetrics, BatchRunner, Progress, ProgressBar, run_batch
from llamastate.batch.metrics import __doc__ as documentation
from llamastate.batch.metrics import serve
from llamastate.cli import main
from llamastate.errors import FileAccessError, InvalidArgumentError
from tests import tiny
from tests.batch.lines import by_id, chat, write
from tests.children import ROOT


def command(folder: Path, *more: object) -> list[str]:
    model = tiny.path("dense", vocab="spm")
    words = ["run-batch", "-i", folder / "in", "-o", folder / "out", "-m", model, "-t", 1, "--max-num-seqs", 4, *more]
    return [str(word) for word in words]


def run(folder: Path, *more: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "llamastate", *command(folder, *more)]
    return subprocess.run(words, cwd=ROOT, input=stdin, capture_output=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "in", [chat(f"r{i}", f"the and of {i}", max_tokens=4) for i in range(10)])
    return tmp_path


def test_a_run(folder: Path) -> None:
    done = run(folder, "--summary", folder / "summary")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.count(b"\n") == 1  # no bar where there is no terminal
    assert len(by_id(folder / "out")) == 10
    summary = json.loads((folder / "summary").read_bytes())
    assert (summary["completed"], summary["stopped"]) == (10, None)
    assert summary["runner"]["done"] == 10
    again = run(folder, "--quiet", "--summary", "-")
    assert (again.returncode, again.stderr) == (0, b"")
    assert json.loads(again.stdout)["skipped"] == 10


def test_through_pipes(folder: Path) -> None:
    done = run(folder, "-i", "-", "-o", "-", "-q", stdin=(folder / "in").read_bytes() + b"rubbish\n")
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 11


def test_flags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-model-len", 40, "--max-num-batched-tokens", 64, "--seed", 3, "--served-model-name", "m", "-c", 600]
    flags += ["--kv-cache-dtype", "q8_0", "--temperature", 0, "--max-tokens", 7, "--store", folder / "blocks"]
    write(folder / "in", [chat("a", "the"), chat("b", "the and of " * 20)])
    assert main(command(folder, *flags)) == 3
    found = by_id(folder / "out")
    assert found["a"]["response"]["body"]["model"] == "m"
    assert found["a"]["response"]["body"]["usage"]["completion_tokens"] <= 7
    assert found["b"]["error"]["code"] == "context_length_exceeded"
    assert (folder / "blocks").is_dir()
    assert main(command(folder)) == 1  # another run
    assert "--kv-cache-dtype was 'q8_0', now 'f16'; do them again (--on-change redo)" in capsys.readouterr().err
    assert main(command(folder, "--no-resume", "--flash-attn", "off")) == 0
    assert main(command(folder, "-fa", "on")) == 1
    assert "--flash-attn was 'off', now 'on'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("-i", "none"),
        ("-m", "none"),
        ("--metrics-host", "no such place", "--metrics-port", "0"),
        ("--kv-cache-dtype", "q8_0", "--flash-attn", "off"),
    ],
)
def test_errors_are_sentences(folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, *words)) == 1
    assert capsys.readouterr().err.startswith("llamastate: ")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-num-seqs", "0"),
        ("--max-num-seqs", "many"),
        ("--max-num-batched-tokens", "0"),
        ("--max-model-len", "10"),
        ("--ctx-size", "-5"),
        ("--kv-cache-dtype", "fp8"),
        ("--threads", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--max-tokens", "-1"),
        ("--metrics-port", "99999"),
        ("--store-bytes", "10GB"),
        ("--store-bytes", "1x"),
        ("--input-file", "in.csv"),
        ("--output-file", "out.jsonl.gz"),
        ("--nonsense", "1"),
    ],
)
def test_wrong_usage_names_the_flag(folder: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command(folder), flag, value])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: llamastate run-batch")
    assert flag in told.splitlines()[-1]
    assert not (folder / "out").exists()


def test_sizes_with_units(folder: Path) -> None:
    assert main(command(folder, "--store", folder / "blocks", "--store-bytes", "10MB")) == 0


def test_what_is_wrong_is_found_before_the_model_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "in").read_bytes()
    (folder / "list.json").write_text(json.dumps([json.loads(raw) for raw in before.splitlines()], indent=1))
    for words, status, said in (
        (("-o", folder / "in"), 2, "input and output are the same file"),
        (("--no-resume", "-o", folder / "in"), 2, "input and output are the same file"),
        (("--summary", folder / "in"), 2, "input and summary are the same file"),
        (("--summary", folder / "list.json"), 1, "is no summary of this command"),
        (("-i", folder / "list.json"), 1, "JSON Lines"),
    ):
        assert main([*command(folder, *words), "-m", "none"]) == status
        assert said in capsys.readouterr().err
    assert (folder / "in").read_bytes() == before


@pytest.mark.parametrize(
    ("module", "words"), [("prometheus_client", ("--enable-metrics",)), ("pyarrow", ("-o", "x.parquet"))]
)
def test_an_extra_that_is_missing(
    folder: Path,
    module: str,
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*command(folder, *words), "-m", "none"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert "pip install 'llamastate[" in told


def test_streams_that_are_closed(folder: Path) -> None:
    shell = shlex.join([sys.executable, "-m", "llamastate", *command(folder, "-o", folder / "unseen")])
    assert subprocess.run(f"{shell} 2>&-", shell=True, cwd=ROOT, timeout=60, check=False).returncode == 0
    assert len(by_id(folder / "unseen")) == 10
    for end, words in (("<&-", ("-i", "-")), (">&-", ("-o", "-"))):
        line = shlex.join([sys.executable, "-m", "llamastate", *command(folder, *words)])
        done = subprocess.run(f"{line} {end}", shell=True, cwd=ROOT, capture_output=True, timeout=60, check=False)
        assert done.returncode == 1
        (told,) = done.stderr.decode().splitlines()
        assert "closed" in told
    line = shlex.join([sys.executable, "-m", "llamastate", *command(folder, "-o", "-", "-q")])
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(line, shell=True, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr.startswith(b"llamastate: nobody reads the output")


def test_what_failed_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "in", [chat("a", "the", max_tokens=1), chat("b", "x", echo=1), chat("c", "x", echo=1), b"rubbish\n"])
    assert main(command(folder)) == 3
    told = capsys.readouterr().err
    assert (
        "errors: 2 unsupported_parameter, 1 invalid_json; the first: line 2: there is no parameter 'echo' here" in told
    )


def test_progress_without_a_terminal() -> None:
    file = io.StringIO()
    with contextlib.closing(ProgressBar(file, seconds=30)) as show:
        for seconds in (0, 29, 31, 45, 62):
            show(Progress(total=100, done=seconds, generated_tokens=10 * seconds, seconds=seconds))
    assert file.getvalue() == "31 of 100 done, 10 tok/s, 0% shared\n62 of 100 done, 10 tok/s, 0% shared\n"
    with contextlib.closing(ProgressBar(file)) as show:
        show(Progress(seconds=1000))
    assert file.getvalue().count("\n") == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_by_a_signal(tmp_path: Path, number: signal.Signals, status: int) -> None:
    write(tmp_path / "in", [chat(f"r{i}", f"the and of {i}", max_tokens=200, ignore_eos=True) for i in range(300)])
    words = [sys.executable, "-m", "llamastate", *command(tmp_path)]
    out = tmp_path / "out"
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not out.exists() or out.stat().st_size < 5000:
            assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"stopped by {number.name}" in err
    assert "the same command goes on" in err
    assert 0 < len(by_id(out)) < 300


def test_a_terminal_gets_a_bar(folder: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = [sys.executable, "-m", "llamastate", *command(folder)]
    with subprocess.Popen(words, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                if not (piece := os.read(ours, 4096)):
                    break
            except OSError:  # how Linux ends a terminal
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0
    assert b"10/10" in shown
    assert b"tok/s" in shown


def test_metrics(folder: Path) -> None:
    from tests.helpers import model

    registry = CollectorRegistry()
    with BatchRunner(model("dense", vocab="spm"), n_parallel=4, n_ctx=1024, n_threads=1) as runner:
        metrics = BatchMetrics(runner, registry)
        server = serve(0, registry=registry)
        try:
            run_batch(folder / "in", folder / "out", runner=runner, on_result=metrics.observe)
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                shown = answer.read().decode()
            with pytest.raises(FileAccessError):
                serve(server.server_port, registry=registry)
        finally:
            server.shutdown()
            server.server_close()
        stats = runner.stats
        values = dict(raw.rsplit(" ", 1) for raw in shown.splitlines() if not raw.startswith("#"))
        assert float(values['llamastate:requests_total{status="ok"}']) == 10
        assert float(values["llamastate:prompt_tokens_total"]) == stats.prompt_tokens > 0
        assert float(values["llamastate:prompt_tokens_cached_total"]) == stats.cached_tokens > 0
        assert float(values["llamastate:time_to_first_token_seconds_count"]) == 10
        assert 0 <= float(values["llamastate:kv_cache_usage_ratio"]) <= 1
        for name in values:
            assert re.sub(r"({.*|_bucket|_count|_sum|_created)+$", "", name) in str(documentation)


def test_metrics_of_one_runner_after_another() -> None:
    from tests.helpers import model

    registry = CollectorRegistry()
    made = model("dense", vocab="spm")
    with BatchRunner(made, n_parallel=1, n_ctx=256, n_threads=1) as one:
        first = BatchMetrics(one, registry)
        with BatchRunner(made, n_parallel=1, n_ctx=256, n_threads=1) as other:
            with pytest.raises(InvalidArgumentError, match="another runner"):
                BatchMetrics(other, registry)
            first.close()
            first.close()
            second = BatchMetrics(other, registry)
        third = BatchMetrics(one, registry)  # the other runner is closed
        second.close()
        assert registry.get_sample_value("llamastate:num_requests_running") == 0
        third.close()
        assert registry.get_sample_value("llamastate:num_requests_running") is None
