"""A chat that can be undone and redone: every turn is a checkpoint, and going back decodes nothing again.

    python examples/undo_redo.py [MODEL.gguf]

Without a path: SmolLM2-135M-Instruct, fetched on the first run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llamastate import Context, Model, Session

MAX_NEW = 24


def say(session: Session, text: str) -> str:
    """One turn: a checkpoint, what the user says, what the model answers."""
    session.checkpoint(text)
    session.feed(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", parse_special=True)
    answer = session.generate(MAX_NEW, stop="<|im_end|>")
    if answer.finish_reason != "stop":
        session.feed("<|im_end|>", parse_special=True)
    session.feed("\n")
    return answer


def main(path: str) -> None:
    with Model(path) as model, Context(model, n_ctx=1024) as ctx:
        session = Session(ctx)
        for text in ("Name a colour.", "Name an animal."):
            print(f"> {text}\n{say(session, text).strip()}")
        first = session.tokens.tolist()
        print(f"  {session.n_past} tokens, turns: {[point.label for point in session.checkpoints]}")

        print(f"undo: {session.undo()} tokens decoded again, {session.n_past} left")
        print(f"redo: {session.redo()} tokens decoded again, {session.n_past} there")
        assert session.tokens.tolist() == first

        session.undo()
        text = "Name a city."
        print(f"undo, and another question\n> {text}\n{say(session, text).strip()}")
        print(f"  turns: {[point.label for point in session.checkpoints]}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from tests.models import smollm2

        main(str(smollm2()))
