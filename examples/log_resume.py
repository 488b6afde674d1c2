"""A conversation with tools that dies in the middle, is brought back in a new process from its log, and is forked.

    python examples/log_resume.py [MODEL.gguf]

Without a path: SmolLM2-135M-Instruct, fetched on the first run. What the tools say is scripted; small models call none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llamastate import Context, Model, Session
from llamastate import log as sessions
from llamastate.log import SessionLog, SQLiteLogStore, assistant, reasoning, tool_call, tool_result, user

PROMPT = "You help with travel. You can look up trains and the weather. " * 4
TURNS = (
    ("When does a train to Ghent leave?", "trains", {"to": "Ghent"}, "10:02, 10:32, 11:02"),
    ("And what is the weather there?", "weather", {"city": "Ghent"}, "rain until noon"),
    ("Then tell me about a museum.", "museums", {"city": "Ghent"}, "MSK, SMAK, STAM"),
)
MAX_NEW = 16


def turn(log: SessionLog, session: Session, number: int) -> None:
    """One turn: question, reasoning, call, result, answer; each recorded when it is there."""
    question, tool, arguments, result = TURNS[number]
    model = session.ctx.model
    log.save_delta([user(question), reasoning(f"I have to ask {tool}."), tool_call(f"c{number}", tool, arguments)])
    log.save_delta([tool_result(f"c{number}", result)])
    state = log.restore()
    sync = sessions.sync_text(session, sessions.render(model, state))
    answer = session.generate(MAX_NEW)
    log.save_delta([assistant(str(answer))])
    log.save_usage(len(state.history), session.n_past - len(answer.tokens), sync.reused, 0, len(answer.tokens))
    log.save_turn_end(number + 1)
    print(f"> {question}\n  [{tool}: {result}]\n  {str(answer).strip()!r}", flush=True)


def talk(path: str, folder: str) -> None:
    """The first process. It dies in its third turn: nothing is closed, nothing is tidied up."""
    with SQLiteLogStore(Path(folder, "log.db")) as store, Model(path) as model, Context(model, n_ctx=2048) as ctx:
        log = SessionLog.create(store, system_prompt=PROMPT, config={"max_tokens": MAX_NEW}, session_id="trip")
        session = sessions.resume(store, "trip", ctx)
        for number in (0, 1):
            turn(log, session, number)
            sessions.lock_session(log, session, Path(folder, f"turn-{number + 1}.llsnap"))
        log.save_delta([user(TURNS[2][0])])
        os.kill(os.getpid(), signal.SIGKILL)


def go_on(path: str, folder: str) -> None:
    """The second process: back with its state, forked in its past, and on in both."""
    with (
        SQLiteLogStore(Path(folder, "log.db")) as store,
        Model(path) as model,
        Context(model, n_ctx=4096, n_seq_max=2) as ctx,
    ):
        log = SessionLog.open(store, "trip")
        print(f"the log holds: {log.verify()} entries, {log.restore().turn_count} turns")
        start = time.perf_counter()
        back = sessions.resume_log(log, ctx)
        took = (time.perf_counter() - start) * 1e3
        print(f"back in {took:.0f} ms: {back.sync.reused} tokens reused, {back.sync.decoded} decoded")

        # without its state, to compare
        start = time.perf_counter()
        scratch = sessions.resume_log(log, ctx, seq_id=1, render=lambda state: back.session.tokens, state=False)
        took = (time.perf_counter() - start) * 1e3
        same = back.session.logits.argmax() == scratch.session.logits.argmax()
        print(f"without it in {took:.0f} ms: {scratch.sync.decoded} tokens decoded; the same token follows: {same}")
        ctx.seq_rm(1)

        answer = back.session.generate(MAX_NEW)
        log.save_delta([assistant(str(answer))])
        log.save_outcome("finished")

        first = next(e.hash for e in log.entries() if e.entry.kind == "locked")  # the state after turn 1
        other = log.fork_at(first, session_id="another-trip")
        forked = sessions.resume_log(other, ctx, seq_id=1)
        print(f"forked after turn 1: {forked.sync.reused} tokens reused, {forked.sync.decoded} decoded")
        turn(other, forked.session, 2)
        print(sessions.tree_text(sessions.forest(store)), end="")


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part in ("talk", "go_on"):
            print(f"-- a process: {part}", flush=True)
            done = subprocess.run([sys.executable, __file__, path, part, folder], check=False)
            if done.returncode != (-signal.SIGKILL if part == "talk" else 0):
                sys.exit(f"{part} ended with {done.returncode}")
            print(f"-- it ended with {done.returncode}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        {"talk": talk, "go_on": go_on}[sys.argv[2]](sys.argv[1], sys.argv[3])
    elif len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from tests.models import smollm2

        main(str(smollm2()))
