"""``llamastate run-batch``: a file of requests in, a file of results out, interrupted as often as may be."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from llamastate.atomic import write_atomically
from llamastate.errors import SaveError

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
    parser.set_defaults(run=_run)
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
    group("--retry-errors", action="store_true", help="try requests again whose result is an error")
    group(
        "--on-change",
        choices=("error", "redo"),
        default="error",
        help="results whose request, model or options have changed since: refuse to go on, or do them again",
    )

    group = parser.add_argument_group("what runs at once").add_argument
    group("--max-num-seqs", type=int, default=32, metavar="N", help="outputs generated at once (32)")
    group("--max-num-batched-tokens", type=int, default=512, metavar="N", help="tokens in one decode (512)")
    group("--max-model-len", type=int, metavar="N", help="tokens of one request, output and all (the model's)")
    group("-c", "--ctx-size", type=int, default=0, metavar="N", help="cells of the cache, for all together")
    group("--kv-cache-dtype", default="f16", metavar="TYPE", help="type of the cache: f16, q8_0, q4_0, ...")
    group(
        "-fa",
        "--flash-attn",
        choices=("auto", "on", "off"),
        default="auto",
        help="off is faster on a processor where requests begin with the same long text, and slower where they do not",
    )
    group(
        "--fixed-shapes", action="store_true", help="outputs that do not depend on what else runs, bit for bit; slower"
    )
    group("-t", "--threads", type=int, metavar="N", help="threads of computation (all cores)")
    group("-ngl", "--gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 for all")
    group("--store", metavar="FOLDER", help="a prefix store: what prompts begin with is computed once and for all")
    group("--store-bytes", type=int, metavar="N", help="what the store may take on disk")

    group = parser.add_argument_group("for requests that do not say").add_argument
    group("--seed", type=int, default=0, metavar="N", help="with the custom_id it makes the request's seed (0)")
    group("--temperature", type=float, default=1.0, metavar="T", help="1, as in OpenAI's API; 0 is greedy")
    group("--max-tokens", type=int, metavar="N", help="of a chat's answer (as many as there is room for)")

    group = parser.add_argument_group("what is to be seen").add_argument
    group("-q", "--quiet", action="store_true", help="no progress bar, no last words")
    group("--summary", metavar="FILE", help="figures of the run as JSON (- for standard output)")
    group("--enable-metrics", action="store_true", help="answer Prometheus while it runs")
    group("--metrics-port", "--port", type=int, metavar="PORT", help="where (8000); enables metrics")
    group("--metrics-host", "--host", default="127.0.0.1", metavar="HOST", help="for whom (127.0.0.1)")


def _run(options: argparse.Namespace) -> int:
    # a model takes seconds to load: whatever is wrong with the rest should be found first
    from llamastate.batch.metrics import BatchMetrics, serve
    from llamastate.batch.openai import Defaults
    from llamastate.batch.pipeline import check_input, run_batch
    from llamastate.batch.progress import ProgressBar
    from llamastate.batch.runner import BatchRunner
    from llamastate.batch.tables import is_table, run_table
    from llamastate.model import Model

    check_input(options.input_file)
    defaults = Defaults(seed=options.seed, temperature=options.temperature)
    if options.max_tokens is not None:
        defaults = Defaults(defaults.seed, defaults.temperature, options.max_tokens)
    with contextlib.ExitStack() as stack:
        store = _store(options, stack)
        model = stack.enter_context(Model(options.model, n_gpu_layers=options.gpu_layers))
        runner = stack.enter_context(
            BatchRunner(
                model,
                n_parallel=options.max_num_seqs,
                n_ctx=options.ctx_size,
                store=store,
                n_batch=options.max_num_batched_tokens,
                n_threads=options.threads,
                type_k=options.kv_cache_dtype,
                type_v=options.kv_cache_dtype,
                flash_attn=options.flash_attn,
                max_model_len=options.max_model_len,
                fixed_shapes=options.fixed_shapes,
            )
        )
        on_result = None
        if options.enable_metrics or options.metrics_port is not None:
            metrics = BatchMetrics(runner)
            on_result = metrics.observe
            if store is not None:
                from llamastate.prefix.metrics import StoreCollector

                StoreCollector(store)
            server = serve(8000 if options.metrics_port is None else options.metrics_port, options.metrics_host)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
        bar = None if options.quiet else stack.enter_context(contextlib.closing(ProgressBar()))
        run: Any = run_table if is_table(options.input_file) or is_table(options.output_file) else run_batch
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


def _store(options: argparse.Namespace, stack: contextlib.ExitStack) -> Any:
    if options.store is None:
        return None
    from llamastate.prefix import PrefixStore

    return stack.enter_context(PrefixStore(options.store, disk_bytes=options.store_bytes))


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
    if options.quiet:
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
    if summary.stopped is not None:
        print(f"stopped by {summary.stopped}, {summary.unfinished} requests under way are not in the output: "
              "the same command goes on", file=sys.stderr)  # fmt: skip
