"""llama-cpp-python with a cache that outlives the process: the second run does not read its prompt again.

    python examples/llama_cpp_cache.py [MODEL.gguf]

Without a path: SmolLM2-135M-Instruct, fetched on the first run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama_cpp

from llamastate.interop.llama_cpp import LlamaStateCache

RULES = "You are a kind and patient teacher. You answer in one short sentence, and you never invent anything. " * 8
QUESTIONS = ("What is rain?", "What is a cloud?", "What is the sun?")


def run(path: str, folder: str) -> list[str]:
    """What a program does from its start to its end."""
    llm = llama_cpp.Llama(path, n_ctx=2048, n_batch=128, verbose=False)
    answers = []
    with LlamaStateCache(folder) as cache:
        llm.set_cache(cache)
        for question in QUESTIONS:
            start = time.perf_counter()
            answer = llm.create_completion(f"{RULES}\n{question}\n", max_tokens=12, temperature=0.0)
            seconds = time.perf_counter() - start
            tokens, read = answer["usage"]["prompt_tokens"], cache.stats().hit_tokens
            print(f"  {question:18} {tokens} tokens of prompt, answered in {seconds:.2f} s; {read} restored up to now")
            answers.append(answer["choices"][0]["text"])
        size = cache.cache_size
    llm.close()
    print(f"  {size} bytes are stored")
    return answers


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("the first run")
        run(path, folder)
        print("the second, which might be tomorrow")
        run(path, folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from tests.models import smollm2

        main(str(smollm2()))
