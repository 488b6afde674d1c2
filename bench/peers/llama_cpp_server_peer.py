"""The batching server of llama-cpp-python's examples, for the bench of batches. Imports nothing of llamastate.

Runs where the server's requirements are installed. The first line says where ``server.py`` is and how to set it up;
each other one has prompts (token ids) and how many tokens to generate, and is answered with seconds and tokens. All
prompts of a line are asked for at once, each on a connection of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from talk import Talk


def main() -> None:
    """Serve until the end of the input."""
    talk = Talk()
    asked = iter(talk)
    task = next(asked)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = {
        "path": task["model"],
        "n_ctx": task["n_ctx"],
        "n_batch": task["n_batch"],
        "n_ubatch": 512,
        "n_seq_max": task["n_parallel"],
        "threads": task["n_threads"],
        "threads_batch": task["n_threads"],
        "flash_attn": task["flash_attn"],
        "kv_unified": True,
        "store_logits": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "config.json")
        with open(config, "w") as file:
            json.dump({"server": {"host": "127.0.0.1", "port": port}, "model": model}, file)
        server = subprocess.Popen(
            [sys.executable, task["server"], "-C", config], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            wait(server, port)
            talk.answer({"version": importlib.metadata.version("llama-cpp-python")})
            for work in asked:
                prompts, n_generate = work["prompts"], work["n_generate"]
                with ThreadPoolExecutor(len(prompts)) as pool:
                    started = time.perf_counter()
                    n = sum(pool.map(complete, [port] * len(prompts), prompts, [n_generate] * len(prompts)))
                    talk.answer({"seconds": time.perf_counter() - started, "tokens": n})
        finally:
            server.terminate()
            server.wait()


def wait(server: subprocess.Popen[bytes], port: int) -> None:
    """Until it answers."""
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError):
            ask(port, "GET", "/healthz")
            return
        time.sleep(0.2)
    raise SystemExit(f"the server did not start: {server.poll()}")


def complete(port: int, prompt: list[int], n: int) -> int:
    """Tokens of one completion."""
    body = json.dumps({"prompt": prompt, "max_tokens": n, "temperature": 0})
    return int(ask(port, "POST", "/v1/completions", body)["usage"]["completion_tokens"])


def ask(port: int, method: str, path: str, body: str | None = None) -> dict:
    """One request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise SystemExit(f"{response.status}: {text[:500]!r}")
        return dict(json.loads(text or b"{}"))
    finally:
        connection.close()


if __name__ == "__main__":
    main()
