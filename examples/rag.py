"""Questions about documents: a long system prompt, documents in varying combination, a question each (RAG-style).

Answered without a store, with one, and, in another process, with what that one has left on disk.

    python examples/rag.py [MODEL.gguf]

Without a path: SmolLM2-135M-Instruct, fetched on the first run.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from llamastate import Context, Model
from llamastate.prefix import PrefixStore

#: Python's own documentation. What is asked for most comes first, as it should where prefixes are to be shared.
DOCUMENTS = ("assert", "pass", "del", "break")
REQUESTS = (
    (("assert",), "What is an assert statement for?"),
    (("assert", "pass"), "What does pass do?"),
    (("assert", "del"), "What does del do to a name?"),
    (("assert", "pass"), "Which of these does nothing?"),
    (("assert", "del", "break"), "Where may break be used?"),
    (("assert",), "What is __debug__?"),
)
RULES = "Answer from the documents below, in one short sentence. If they do not tell, say so. Do not guess. " * 4
BLOCK = 64
MAX_NEW = 12


def prompts(model: Model) -> Iterator[np.ndarray]:
    """Token ids of each request."""
    texts = {name: topics[name].strip()[:300] for name in DOCUMENTS}
    for names, question in REQUESTS:
        documents = "".join(f"\n\n## {name}\n\n{texts[name]}" for name in names)
        yield model.tokenize(
            f"<|im_start|>system\n{RULES}{documents}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            "<|im_start|>assistant\n",
            add_special=False,
            parse_special=True,
        )


def answer(ctx: Context, ids: np.ndarray, store: PrefixStore | None) -> tuple[list[int], int, float]:
    """The answer, how many tokens came from the store, and the seconds to the first token."""
    start = time.perf_counter()
    ctx.seq_rm(0)
    n = 0 if store is None else store.load(ctx, 0, ids, max_tokens=(len(ids) - 1) // BLOCK * BLOCK)
    reused = n
    # Block by block, with and without the store: equal steps give equal logits. And where a model's memory cannot be
    # cut by tokens, a prefix can be had wherever something was put.
    while n < len(ids):
        ctx.decode(ids[n : n + BLOCK])
        n = min(n + BLOCK, len(ids))
        if store is not None:
            store.put(ctx, 0, ids[:n])
    tokens = [int(ctx.logits().argmax())]
    seconds = time.perf_counter() - start
    while len(tokens) < MAX_NEW and not ctx.model.is_eog(tokens[-1]):
        ctx.decode(tokens[-1:])
        tokens.append(int(ctx.logits().argmax()))
    return tokens, reused, seconds


def run(path: str, folder: str) -> dict[str, Any]:
    """Answer all requests; with the store in this folder, if one is named."""
    found: dict[str, Any] = {"answers": [], "reused": [], "asked": [], "seconds": [], "bytes": 0}
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model(path))
        asked = list(prompts(model))
        # one sequence more than is needed: blocks pass through it
        ctx = stack.enter_context(Context(model, n_ctx=max(map(len, asked)) + MAX_NEW, n_seq_max=2))
        store = stack.enter_context(PrefixStore(folder, block_tokens=BLOCK)) if folder else None
        for ids in asked:
            tokens, reused, seconds = answer(ctx, ids, store)
            found["answers"].append(model.detokenize(tokens).strip())
            found["reused"].append(reused)
            found["asked"].append(len(ids))
            found["seconds"].append(seconds)
        if store is not None:
            store.flush()
            disk = store.stats().disk
            assert disk is not None
            found["bytes"] = disk.bytes
    return found


def process(path: str, folder: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, path, "--run", folder]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "without a store": process(path, ""),
            "with one": process(path, folder),
            "in a new process": process(path, folder),
        }
    plain = runs["without a store"]
    for (names, question), text in zip(REQUESTS, plain["answers"], strict=True):
        print(f"{' + '.join(names)}: {question}\n  {text}")
    print(f"\n{'':18}{'reused':>8}{'of':>7} tokens   time to first token, in ms: each request")
    for name, found in runs.items():
        times = "".join(f"{1e3 * t:8.0f}" for t in found["seconds"])
        print(f"{name:<18}{sum(found['reused']):>8}{sum(found['asked']):>7}        {times}")
    same = all(found["answers"] == plain["answers"] for found in runs.values())
    print(f"{runs['with one']['bytes'] / 1e6:.1f} MB on disk; the answers are {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    if sys.argv[2:3] == ["--run"]:
        print(json.dumps(run(sys.argv[1], sys.argv[3])))
    elif len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from tests.models import smollm2

        main(str(smollm2()))
