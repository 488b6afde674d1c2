"""The other side of ``test_cyllama.py``: runs where cyllama is installed, and imports nothing of llamastate.

One JSON value a line: first what to decode, then ``"get"`` or ``"set"``; each is answered with a line.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
import time


def main() -> None:
    """Decode, then do as told until the end of the input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is none of the answers

    from cyllama.llama import llama_cpp as cy

    cy.disable_logging()
    task = json.loads(sys.stdin.readline())
    model = cy.LlamaModel(task["model"], cy.LlamaModelParams())
    params = cy.LlamaContextParams()
    params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified = task["n_ctx"], 512, 4, True
    params.n_threads = params.n_threads_batch = task["n_threads"]
    params.flash_attn_type = 1
    context = cy.LlamaContext(model, params)
    tokens = task["tokens"]
    for start in range(0, len(tokens), 512):
        batch = cy.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
        batch.set_batch(tokens[start : start + 512], start, False)
        context.decode(batch)
    state = context.get_state_seq_data(0)
    answer(out, {"n_bytes": len(state), "version": importlib.metadata.version("cyllama")})

    operations = {"get": lambda: context.get_state_seq_data(0), "set": lambda: context.set_state_seq_data(state, 0)}
    gc.disable()
    for line in sys.stdin:
        operation = operations[json.loads(line)]
        start_time = time.perf_counter()
        result = operation()
        taken = time.perf_counter() - start_time
        del result
        answer(out, {"seconds": taken})


def answer(out, value: dict) -> None:
    """Write one line."""
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
