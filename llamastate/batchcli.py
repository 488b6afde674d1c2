"""``llamastate run-batch``: a file of requests in, a file of results out, interrupted as often as may be."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llamastate._native import consts
from llamastate.atomic import write_atomically
from llamastate.clitext import bytes_of
from llamastate.errors import (
    BatchChangedError,
    CorruptStateError,
    FileAccessError,
    InvalidArgumentError,
    LlamaStateError,
    OutputMovedError,
    SaveError,
)

if TYPE_CHECKING:
    from llamastate.batch.pipeline import BatchSummary

__all__ = ["add_commands"]

_EPILOG = """Ctrl-C ends the run in good order, a second one at once; the same command goes on where it ended, also
after kill -9 or a loss of power. Every custom_id is in the output once.

exit status:
  0  every request has its result
  1  it could not go on
  2  wrong usage
  3  every request has its result, and some are errors: --retry-errors tries those again
  130, 143  ended by Ctrl-C or SIGTERM
"""
#: What the arguments of Python are called here.
_FLAGS = {
    "n_parallel": "--max-num-seqs",
    "n_batch": "--max-num-batched-tokens",
    "max_model_len": "--max-model-len",
    "n_ctx": "--ctx-size",
    "type_k": "--kv-cache-dtype",
    "type_v": "--kv-cache-dtype",
    "flash_attn": "--flash-attn",
    "fixed_shapes": "--fixed-shapes",
    "n_threads": "--threads",
    "n_gpu_layers": "--gpu-layers",
    "disk_bytes": "--store-bytes",
    "temperature": "--temperature",
    "on_change='redo'": "--on-change redo",
    "resume=False": "--no-resume",
}
_FILES = ("output", "journal", "results", "summary")
_OF_SUMMARY = {"output", "completed", "failed", "skipped", "runner"}
#: Endings of files of lines; those of tables besides.
_LINES = (".jsonl", ".ndjson", ".json", ".txt", ".out")
#: Seconds from one line of progress to the next, where there is no terminal.
_EVERY = 30.0
_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


def add_commands(commands: Any, form: type[argparse.HelpFormatter]) -> None:
    """Add ``run-batch`` to the command line's parser."""
    parser = commands.add_parser(
        "run-batch",
        help="answer a file of requests (OpenAI's batch format)",
        description="Answer every request of a JSON Lines file. What requests share is computed once.",
        epilog=_EPILOG,
        formatter_class=form,
    )
    parser.set_defaults(run=_run, usage=parser.error)
    add = parser.add_argument
    add(
        "-i",
        "--input-file",
        required=True,
        metavar="FILE",
        help="requests: .jsonl (- for standard input), .parquet or .arrow",
    )
    add(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="results are added here: .jsonl (- for standard output), .parquet or .arrow",
    )
    add("-m", "--model", required=True, metavar="GGUF", help="the model")
    add("--served-model-name", metavar="NAME", help="for the responses (the file's name)")

    group = parser.add_argument_group("going on").add_argument
    group(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the results that are there; --no-resume empties the output first",
    )
    group(
        "--retry-errors",
        action="store_true",
        help="try requests again whose result is an error, or was cut off because there was no room for more",
    )
    group(
        "--on-change",
        choices=("error", "redo"),
        default="error",
        help="results whose request, model or options have changed since: refuse to go on, or do them again",
    )

    group = parser.add_argument_group("what runs at once").add_argument
    group(
        "--max-num-seqs", type=_whole(1, 200), metavar="N", help="outputs generated at once (16; 32 with --gpu-layers)"
    )
    group(
        "--max-num-batched-tokens", type=_whole(1, 1 << 20), default=512, metavar="N", help="tokens in one decode (512)"
    )
    group(
        "--max-model-len",
        type=_whole(16, 1 << 30),
        metavar="N",
        help="tokens of one request, output and all (the model's)",
    )
    group(
        "-c",
        "--ctx-size",
        type=_whole(0, (1 << 31) - 257),
        default=0,
        metavar="N",
        help="cells of the cache, for all together",
    )
    group(
        "--kv-cache-dtype",
        choices=tuple(consts.CACHE_TYPES),
        default="f16",
        metavar="TYPE",
        help="type of the cache: f16, q8_0, q4_0, ...",
    )
    group(
        "-fa",
        "--flash-attn",
        choices=("auto", "on", "off"),
        default="auto",
        help="off is faster on a processor where requests begin with the same long text, and slower where they do not; "
        "auto (the default) looks at the first ones of a file, and goes on as results were begun",
    )
    group(
        "--fixed-shapes", action="store_true", help="outputs that do not depend on what else runs, bit for bit; slower"
    )
    group("-t", "--threads", type=_whole(1, 512), metavar="N", help="threads of computation (all cores)")
    group(
        "-ngl", "--gpu-layers", type=_whole(-1, 1 << 30), default=0, metavar="N", help="layers on the GPU, -1 for all"
    )
    group("--store", metavar="FOLDER", help="a prefix store: what prompts begin with is computed once and for all")
    group("--store-bytes", type=bytes_of, metavar="SIZE", help="what the store may take on disk (such as 10GB)")

    group = parser.add_argument_group("for requests that do not say").add_argument
    group("--seed", type=int, default=0, metavar="N", help="with the custom_id it makes the request's seed (0)")
    group("--temperature", type=_heat, default=1.0, metavar="T", help="1, as in OpenAI's API; 0 is greedy")
    group(
        "--max-tokens", type=_whole(0, 1 << 30), metavar="N", help="of a chat's answer (as many as there is room for)"
    )

    group = parser.add_argument_group("what is to be seen").add_argument
    group("-q", "--quiet", action="store_true", help="no progress, no last words")
    group("--summary", metavar="FILE", help="figures of the run as JSON (- for standard output)")
    group("--enable-metrics", action="store_true", help="answer Prometheus while it runs")
    group("--metrics-port", "--port", type=_whole(0, 65535), metavar="PORT", help="where (8000); enables metrics")
    group("--metrics-host", "--host", default="127.0.0.1", metavar="HOST", help="for whom (127.0.0.1)")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """For argparse: an integer between two."""

    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return number

    return integer


def _heat(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return number


def _keep_streams() -> None:
    """Have nothing that is opened from here on take the number of a standard stream that is closed.

    llama.cpp writes to that of standard error, whatever file it is.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)


def _run(options: argparse.Namespace) -> int:
    _keep_streams()
    _check_usage(options)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(str(message))
        try:
            return _answer(options)
        except BrokenPipeError:
            # whoever read the results has gone; Python's own flush at the end would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _say("nobody reads the output any more: not all results were written")
            return 1
        except ImportError as error:
            if isinstance(error, LlamaStateError) or error.name not in ("pyarrow", "prometheus_client"):
                raise
            _say(str(error))
            return 1
        except (BatchChangedError, OutputMovedError, InvalidArgumentError) as error:
            _say(_in_flags(str(error)))
            return 2 if isinstance(error, InvalidArgumentError) and error.name in (*_FLAGS, *_FILES) else 1


def _say(words: str) -> None:
    if sys.stderr is not None:  # print() would take standard output instead
        print(f"llamastate: {words}", file=sys.stderr)


def _in_flags(text: str) -> str:
    """A message of the library's, with its arguments as they are called here; what it quotes stays."""
    names = "|".join(map(re.escape, _FLAGS))
    return re.sub(rf"(?<![\w-])({names})(?!\w)|'[^']*'", lambda found: _FLAGS.get(found[1], found[0]), text)


def _check_usage(options: argparse.Namespace) -> None:
    """Find what is wrong with the flags together. A model takes seconds to load."""
    from llamastate.batch.tables import TABLES

    for flag, path in (("-i/--input-file", options.input_file), ("-o/--output-file", options.output_file)):
        ending = os.path.splitext(path)[1].lower()
        if re.fullmatch(r"\.[a-z][a-z0-9]*", ending) and ending not in (*_LINES, *TABLES):
            options.usage(f"argument {flag}: {ending} is none of {', '.join((*_LINES, *TABLES))}")
    if options.store_bytes is not None and options.store is None:
        options.usage("argument --store-bytes: needs --store")


def _answer(options: argparse.Namespace) -> int:
    from llamastate.batch import choices, pipeline
    from llamastate.batch.openai import Defaults
    from llamastate.batch.pipeline import run_batch
    from llamastate.batch.progress import ProgressBar
    from llamastate.batch.runner import BatchRunner
    from llamastate.batch.source import Source, check_input, require_apart
    from llamastate.batch.tables import is_table, require_arrow, results_of, run_table, source_of
    from llamastate.model import Model

    tables = is_table(options.input_file), is_table(options.output_file)
    if any(tables):
        require_arrow()
    if tables[0]:
        Source(options.input_file)
    else:
        check_input(options.input_file)
    if options.output_file == "-" and sys.stdout is None:
        raise FileAccessError("cannot write to '-': standard output is closed", path="-", reason="closed")
    source = Source(options.input_file)
    summary_file = None if options.summary == "-" else options.summary
    require_apart(input=source, output=options.output_file, summary=summary_file)
    if summary_file is not None:
        _require_summary(summary_file)
    defaults = Defaults(seed=options.seed, temperature=options.temperature)
    if options.max_tokens is not None:
        defaults = Defaults(defaults.seed, defaults.temperature, options.max_tokens)
    with contextlib.ExitStack() as stack:
        metered = options.enable_metrics or options.metrics_port is not None
        if metered:
            from llamastate.batch.metrics import require_client

            require_client()
        store = _store(options, stack)
        model = stack.enter_context(Model(options.model, n_gpu_layers=options.gpu_layers))
        settings = {
            "n_parallel": options.max_num_seqs,
            "n_ctx": options.ctx_size,
            "n_batch": options.max_num_batched_tokens,
            "n_threads": options.threads,
            "type_k": options.kv_cache_dtype,
            "type_v": options.kv_cache_dtype,
            "flash_attn": options.flash_attn,
            "max_model_len": options.max_model_len,
            "fixed_shapes": options.fixed_shapes,
        }
        results = results_of(options.output_file) if tables[1] else pipeline.results_of(options.output_file)
        rows = source_of(options.input_file)
        settings = choices.settled(settings, rows, results if options.resume else None, model, defaults)
        runner = stack.enter_context(BatchRunner(model, store=store, **settings))
        on_result = stack.enter_context(_metrics(options, runner, store)) if metered else None
        bar = None
        if not options.quiet and sys.stderr is not None:
            bar = stack.enter_context(contextlib.closing(ProgressBar(seconds=_EVERY)))
        run: Any = run_table if any(tables) else run_batch
        summary = run(
            options.input_file,
            options.output_file,
            runner=runner,
            resume=options.resume,
            retry_errors=options.retry_errors,
            on_change=options.on_change,
            defaults=defaults,
            model_name=options.served_model_name,
            on_progress=bar,
            on_result=on_result,
            handle_signals=True,
        )
    _tell(summary, options)
    if summary.stopped is not None:
        return _SIGNALS.get(summary.stopped, 1)
    return 3 if summary.failed or summary.errors_before else 0


@contextlib.contextmanager
def _metrics(options: argparse.Namespace, runner: Any, store: Any) -> Iterator[Callable[[Any], None]]:
    from llamastate.batch.metrics import BatchMetrics, serve

    metrics = BatchMetrics(runner)
    if store is not None:
        from llamastate.prefix.metrics import StoreCollector

        StoreCollector(store)
    server = serve(8000 if options.metrics_port is None else options.metrics_port, options.metrics_host)
    try:
        yield metrics.observe
    finally:
        server.shutdown()
        server.server_close()
        metrics.close()


def _store(options: argparse.Namespace, stack: contextlib.ExitStack) -> Any:
    if options.store is None:
        return None
    from llamastate.prefix import PrefixStore

    return stack.enter_context(PrefixStore(options.store, disk_bytes=options.store_bytes))


def _require_summary(path: str) -> None:
    """Refuse to write over what is no summary."""
    try:
        with open(path, "rb") as file:
            raw = file.read(1 << 20)
    except OSError:
        return  # if it cannot be written either, that is said better then
    try:
        found = json.loads(raw) if raw.strip() else dict.fromkeys(_OF_SUMMARY)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found.keys() >= _OF_SUMMARY:
        raise CorruptStateError(
            f"{path!r} is no summary of this command, and is not written over", path=path, reason="no summary"
        )


def _tell(summary: BatchSummary, options: argparse.Namespace) -> None:
    if options.summary is not None:
        text = json.dumps(summary.to_dict(), indent=2) + "\n"
        if options.summary == "-":
            sys.stdout.write(text)
        else:
            try:
                write_atomically(options.summary, [text.encode()])
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise SaveError(
                    f"cannot write {options.summary!r}: {reason}", path=options.summary, reason=reason
                ) from None
    if options.quiet or sys.stderr is None:
        return
    done = summary.completed + summary.failed
    rate = summary.generated_tokens / summary.seconds if summary.seconds else 0
    words = [f"{done} results in {summary.seconds:.1f} s"]
    if summary.skipped:
        words.append(f"{summary.skipped} were there already")
    if summary.failed or summary.errors_before:
        words.append(f"{summary.failed + summary.errors_before} errors")
    if done:
        words.append(f"{rate:.0f} tokens/s generated")
        words.append(f"{summary.hit_rate:.1%} of {summary.prompt_tokens} prompt tokens not computed")
    print(f"{summary.output}: {', '.join(words)}", file=sys.stderr)
    if summary.errors:
        counts = ", ".join(f"{n} {code}" for code, n in sorted(summary.errors.items(), key=lambda item: -item[1]))
        print(f"errors: {counts}; the first: {summary.first_error}", file=sys.stderr)
    if summary.full:
        print(f"{summary.full} answers were cut off because there was no room for more: more cells (-c) and "
              "--retry-errors try those again", file=sys.stderr)  # fmt: skip
    if summary.stopped is not None:
        print(f"stopped by {summary.stopped}, {summary.unfinished} requests under way are not in the output: "
              "the same command goes on", file=sys.stderr)  # fmt: skip
