"""The batch loop that one writes by hand: ctypes, one context, waves of sequences, nothing checked."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import POINTER, c_int8, c_int32, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import raw
from llamastate import Context

__all__ = ["Loop"]


class Loop:
    """Greedy generation of many prompts, so many at once.

    Parameters
    ----------
    ctx : Context
        Empty, unified, with ``n_parallel + 1`` sequences.
    n_parallel : int
    """

    def __init__(self, ctx: Context, n_parallel: int) -> None:
        self.ctx = ctx
        self.n_parallel = n_parallel
        self._address = c_void_p(raw.pointer(ctx))
        self._memory = c_void_p(raw.function("llama_get_memory")(raw.pointer(ctx)))
        self._owners = [(c_int32 * 1)(seq) for seq in range(n_parallel + 1)]
        self._n_vocab = ctx.model.n_vocab

    def decode(self, tokens: Any, pos: Any, seqs: Sequence[int], outputs: Any) -> None:
        """One ``llama_decode``."""
        n = len(tokens)
        columns = [np.ascontiguousarray(column, np.int32) for column in (tokens, pos, np.ones(n))]
        flags = np.ascontiguousarray(outputs, np.int8)
        rows = (POINTER(c_int32) * n)(*[ctypes.cast(self._owners[seq], POINTER(c_int32)) for seq in seqs])
        token, position, n_seq_id = (column.ctypes.data_as(POINTER(c_int32)) for column in columns)
        batch = raw.Batch(n, token, None, position, n_seq_id, rows, flags.ctypes.data_as(POINTER(c_int8)))
        if raw.function("llama_decode")(self._address, batch):
            raise RuntimeError("llama_decode failed")

    def best(self, i: int) -> int:
        """The most likely token after a row of the batch."""
        row = raw.function("llama_get_logits_ith")(self._address, i)
        return int(np.ctypeslib.as_array(row, (self._n_vocab,)).argmax())

    def run(
        self, prompts: Sequence[npt.NDArray[np.int32]], n_generate: int, n_shared: int = 0
    ) -> tuple[float, list[list[int]]]:
        """Seconds, and what was generated. The first ``n_shared`` tokens are all prompts'; they are decoded once."""
        rm, cp = raw.function("llama_memory_seq_rm"), raw.function("llama_memory_seq_cp")
        chunk, keep = self.ctx.n_ubatch, self.n_parallel
        started = time.perf_counter()
        for at in range(0, n_shared, chunk):
            part = prompts[0][at : min(at + chunk, n_shared)]
            n = len(part)
            self.decode(part, np.arange(at, at + n), [keep] * n, np.zeros(n))
        texts: list[list[int]] = []
        for first in range(0, len(prompts), self.n_parallel):
            wave = [prompt[n_shared:] for prompt in prompts[first : first + self.n_parallel]]
            made = [self._prompt(seq, own, n_shared) for seq, own in enumerate(wave)] if not n_shared else []
            if n_shared:
                for seq in range(len(wave)):
                    cp(self._memory, keep, seq, 0, -1)
                made = self._prompts(wave, n_shared)
            everybody = range(len(wave))
            ends = np.array([n_shared + len(own) for own in wave])
            for step in range(n_generate - 1):
                self.decode([text[-1] for text in made], ends + step, everybody, np.ones(len(wave)))
                for seq in everybody:
                    made[seq].append(self.best(seq))
            for seq in everybody:
                rm(self._memory, seq, -1, -1)
            texts += made
        return time.perf_counter() - started, texts

    def _prompts(self, wave: list[npt.NDArray[np.int32]], start: int) -> list[list[int]]:
        """The short rests of all prompts of a wave, in as few decodes as they fit."""
        made: list[list[int]] = []
        seq = 0
        while seq < len(wave):
            last = seq + 1
            while last < len(wave) and sum(map(len, wave[seq : last + 1])) <= self.ctx.n_batch:
                last += 1
            some = wave[seq:last]
            ends = np.cumsum([len(own) for own in some])
            outputs = np.zeros(ends[-1])
            outputs[ends - 1] = 1
            pos = np.concatenate([np.arange(start, start + len(own)) for own in some])
            seqs = np.repeat(np.arange(seq, last), [len(own) for own in some]).tolist()
            self.decode(np.concatenate(some), pos, seqs, outputs)
            made += [[self.best(int(end) - 1)] for end in ends]
            seq = last
        return made

    def _prompt(self, seq: int, own: npt.NDArray[np.int32], start: int) -> list[int]:
        """One long prompt, chunk by chunk."""
        chunk = self.ctx.n_ubatch
        n = 0
        for at in range(0, len(own), chunk):
            part = own[at : at + chunk]
            n = len(part)
            outputs = np.zeros(n)
            outputs[-1] = at + n == len(own)
            self.decode(part, np.arange(start + at, start + at + n), [seq] * n, outputs)
        return [self.best(n - 1)]
