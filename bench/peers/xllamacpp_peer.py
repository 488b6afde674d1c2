"""xllamacpp's server for the bench of batches: runs where xllamacpp is installed, and imports nothing of llamastate.

The first line says how to set the server up; each other one has prompts (token ids) and how many tokens to generate,
and is answered with seconds and tokens. As many threads as there are slots ask for completions in turn, without HTTP
between.
"""

from __future__ import annotations

import importlib.metadata
import time
from concurrent.futures import ThreadPoolExecutor

from talk import Talk


def main() -> None:
    """Serve until the end of the input."""
    talk = Talk()
    asked = iter(talk)
    task = next(asked)

    import xllamacpp as xl

    params = xl.CommonParams()
    params.model.path = task["model"]
    params.n_ctx, params.n_batch, params.n_ubatch = task["n_ctx"], task["n_batch"], 512
    params.n_parallel = task["n_parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["n_threads"]
    params.kv_unified = task["kv_unified"]
    params.n_gpu_layers = 0
    kinds = xl.llama_flash_attn_type
    params.flash_attn_type = (
        kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if task["flash_attn"] else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    server = xl.Server(params)
    talk.answer({"version": importlib.metadata.version("xllamacpp")})

    def complete(prompt: list[int], n: int) -> int:
        made = server.handle_completions({"prompt": prompt, "max_tokens": n, "temperature": 0, "cache_prompt": True})
        return int(made["usage"]["completion_tokens"])

    with ThreadPoolExecutor(task["n_parallel"]) as pool:
        for work in asked:
            started = time.perf_counter()
            n = sum(pool.map(complete, work["prompts"], [work["n_generate"]] * len(work["prompts"])))
            talk.answer({"seconds": time.perf_counter() - started, "tokens": n})


if __name__ == "__main__":
    main()
