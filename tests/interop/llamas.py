"""What the tests of states and caches of a ``llama_cpp.Llama`` share."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

#: One of each kind of memory; "chat" is full attention.
KINDS = ("chat", "iswa", "iswa11", "mamba", "mamba2", "jamba", "lfm2", "lfm2swa", "qwen35", "qwen2vl")
VOCAB = {"vocab": "spm"}


def ids(n: int, seed: int = 0) -> list[int]:
    """Random tokens that are plain letters of the tiny SentencePiece vocabulary."""
    return np.random.default_rng(seed).integers(261, 350, n).tolist()


def last_logits(llm: llama_cpp.Llama) -> npt.NDArray[np.float32]:
    """A copy of what the last decode put out, float32[n_vocab]."""
    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy()


def complete(llm: llama_cpp.Llama, prompt: list[int], n: int = 8, **params: Any) -> tuple[list[int], Any]:
    """Complete greedily; the tokens that were evaluated, and the logits after the last one."""
    params = {"max_tokens": n, "temperature": 0.0, **params}
    llm.create_completion(prompt, **params)
    return llm._input_ids.tolist(), last_logits(llm)
