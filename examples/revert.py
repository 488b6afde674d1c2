"""Going back to turn N of a conversation after a restart: one process talks and ends, another goes back and goes on.

    python examples/revert.py [MODEL.gguf]

Without a path: SmolLM2-135M-Instruct, fetched on the first run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llamastate import Context, Model, Session, SessionManager

MAX_NEW = 16


def say(session: Session, text: str) -> str:
    session.feed(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", parse_special=True)
    answer = session.generate(MAX_NEW, stop="<|im_end|>")
    session.feed("\n" if answer.finish_reason == "stop" else "<|im_end|>\n", parse_special=True)
    return answer.strip()


def talk(path: str, folder: str) -> None:
    """The first process: four turns, each a checkpoint."""
    with Model(path) as model, Context(model, n_ctx=2048) as ctx, SessionManager(folder) as manager:
        session = manager.create("chat", ctx)
        for turn, text in enumerate(("Hello!", "Name a fruit.", "Name a river.", "Name a planet."), start=1):
            print(f"> {text}\n{say(session, text)}")
            session.checkpoint(f"turn {turn}")
            manager.save("chat", session)


def revert(path: str, folder: str) -> None:
    """The second one: back to turn 2, and on from there."""
    with SessionManager(folder) as manager:
        for point in manager.checkpoints("chat"):  # needs no model
            print(f"  {point.label}: {point.n_tokens} tokens")
        with Model(path) as model, Context(model, n_ctx=2048) as ctx:
            session = manager.load("chat", ctx)
            start = time.perf_counter()
            replayed = session.rollback(next(p for p in session.checkpoints if p.label == "turn 2"))
            print(f"back to turn 2 in {(time.perf_counter() - start) * 1e3:.2f} ms, {replayed} tokens decoded again")
            print(f"> Name a mountain.\n{say(session, 'Name a mountain.')}")
            manager.save("chat", session)


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part in ("talk", "revert"):
            print(f"-- a process: {part}", flush=True)
            subprocess.run([sys.executable, __file__, path, part, folder], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        {"talk": talk, "revert": revert}[sys.argv[2]](sys.argv[1], sys.argv[3])
    elif len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from tests.models import smollm2

        main(str(smollm2()))
