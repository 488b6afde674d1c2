"""One system prompt for many users: read once, then shared by branches in one context, and by snapshot in others.

    python examples/shared_prompt.py [MODEL.gguf]

Without a path: SmolLM2-135M-Instruct, fetched on the first run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llamastate import Context, Model, Session, Snapshot

PROMPT = (
    "<|im_start|>system\n" + "You are a kind and patient teacher. Answer in one short sentence. " * 8 + "<|im_end|>\n"
)
QUESTIONS = ("What is rain?", "What is a cloud?", "What is the sun?")
MAX_NEW = 16


def ask(session: Session, question: str) -> str:
    session.feed(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", parse_special=True)
    return session.generate(MAX_NEW, stop="<|im_end|>").strip()


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Model(path) as model:
        file = Path(folder, "system.llsnap")
        with Context(model, n_ctx=4096, n_seq_max=1 + len(QUESTIONS)) as ctx:
            start = time.perf_counter()
            system = Session(ctx, 0)
            n = system.feed(PROMPT, parse_special=True)
            print(f"the prompt: {n} tokens, read in {time.perf_counter() - start:.3f} s")
            start = time.perf_counter()
            users = [system.branch(i) for i in range(1, 1 + len(QUESTIONS))]
            print(f"{len(users)} branches: {(time.perf_counter() - start) * 1e3:.1f} ms; they share its cells")
            branched = [ask(user, question) for user, question in zip(users, QUESTIONS, strict=True)]
            size = system.save(file)

        # Another context, which may as well be in another process: the prompt comes from the file.
        restored = []
        with Snapshot.open(file) as snapshot, Context(model, n_ctx=4096, n_seq_max=len(QUESTIONS)) as ctx:
            start = time.perf_counter()
            users = [Session.from_snapshot(ctx, snapshot, seq_id=i) for i in range(len(QUESTIONS))]
            print(f"{len(users)} times from a file of {size} bytes: {(time.perf_counter() - start) * 1e3:.1f} ms")
            restored = [ask(user, question) for user, question in zip(users, QUESTIONS, strict=True)]

        for question, one, other in zip(QUESTIONS, branched, restored, strict=True):
            print(f"> {question}\n  branch:   {one}\n  snapshot: {other}")
        print(
            "Branches share cells, snapshots bring their own. The order of cells decides a logit's last bits, and\n"
            "where two tokens are nearly as likely, those decide (docs/state.md, Noise)."
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from tests.models import smollm2

        main(str(smollm2()))
