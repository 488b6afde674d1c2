"""Prompts into vectors, on a context of its own."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llamastate._native import consts
from llamastate.batch.request import Embedding
from llamastate.context import Context
from llamastate.errors import DecodeError, InvalidArgumentError, LlamaStateError

if TYPE_CHECKING:
    from llamastate.batch.tasks import Ticket
    from llamastate.model import Model

__all__ = ["Embedder"]

#: Sequences in one decode.
N_SEQUENCES = 16
#: llama.cpp puts out logits with every embedding: rows of a decode times n_vocab stay below this.
MAX_LOGITS = 1 << 25


class Embedder:
    """Vectors of prompts.

    Parameters
    ----------
    model : Model
    n_threads : int or None

    Notes
    -----
    A model that was made for it pools as it says itself, and its prompts have to fit one physical batch (as long as
    the model's context, at most 2,048 tokens). Of any other model the mean over all tokens is taken, as
    llama.cpp's mean pooling does, of prompts of any length that the model can read. Vectors are scaled to length 1.
    """

    def __init__(self, model: Model, n_threads: int | None) -> None:
        self.model = model
        self.queue: deque[Ticket] = deque()
        self.seconds = 0.0
        limit = min(model.n_ctx_train or 512, 2048)
        self._ctx = self._context(limit, limit, n_threads)
        pooling = self._ctx._handle.pooling_type
        self.pooled = pooling != consts.POOLING["none"]
        if pooling == consts.POOLING["rank"]:
            self._ctx.close()
            raise InvalidArgumentError("this model ranks, it makes no embeddings", name="kind", value="embed")
        self.limit = limit
        if not self.pooled:
            self._ctx.close()
            rows = max(16, min(512, MAX_LOGITS // model.n_vocab))
            self.limit = model.n_ctx_train or 1 << 30
            self._ctx = self._context(min(self.limit, 4 * limit), rows, n_threads)
            self.limit = min(self.limit, self._ctx.n_ctx)
        #: Under way: tokens that are done, and the sum of their vectors.
        self._begun: dict[Ticket, tuple[int, npt.NDArray[np.float64]]] = {}

    def _context(self, n_ctx: int, n_batch: int, n_threads: int | None) -> Context:
        n_batch = max(n_batch, N_SEQUENCES)
        return Context(
            self.model,
            n_ctx=max(n_ctx, 256),
            n_seq_max=N_SEQUENCES,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=n_threads,
            embeddings=True,
        )

    def add(self, ticket: Ticket) -> None:
        """Let a request wait.

        Raises
        ------
        InvalidArgumentError
            Its prompt is too long.
        """
        n = len(ticket.tokens)
        if n > self.limit:
            raise InvalidArgumentError(
                f"a prompt of {n} tokens is longer than the {self.limit} that can be embedded",
                name="prompt",
                value=n,
                limit=self.limit,
            )
        self.queue.append(ticket)

    def step(self) -> list[tuple[Ticket, Embedding | LlamaStateError]]:
        """One decode; the vectors that are complete."""
        started = time.perf_counter()
        ctx = self._ctx
        parts: list[tuple[Ticket, int, int]] = []
        left, room = ctx.n_batch, ctx.n_ctx
        for ticket in self.queue:
            begun = self._begun.get(ticket, (0, None))[0]
            n = len(ticket.tokens) - begun
            if len(parts) == N_SEQUENCES or len(ticket.tokens) > room or not left or (self.pooled and n > left):
                break
            n = min(n, left)
            parts.append((ticket, begun, begun + n))
            left -= n
            room -= len(ticket.tokens)
        done: list[tuple[Ticket, Embedding | LlamaStateError]] = []
        try:
            self._decode(parts)
        except DecodeError as error:
            ctx.clear(data=False)
            for ticket, _, _ in parts:
                self.drop(ticket)
                done.append((ticket, error))
            return done
        at = 0
        for seq, (ticket, start, end) in enumerate(parts):
            if self.pooled:
                total = ctx.embeddings_seq(seq).astype(np.float64)
            else:
                total = self._begun.get(ticket, (0, np.zeros(self.model.n_embd_out)))[1]
                for i in range(at, at + end - start):
                    total = total + ctx.embeddings(i)
            at += end - start
            self._begun[ticket] = end, total
            if end == len(ticket.tokens):
                done.append((ticket, _unit(total)))
        # Whoever is done was first in the queue. Only the last can be in the middle, and is the first of the next.
        last = parts[-1]
        unfinished = last[2] < len(last[0].tokens)
        for seq in range(len(parts)):
            if unfinished and seq == len(parts) - 1:
                if seq:
                    ctx.seq_cp(seq, 0)
                    ctx.seq_rm(seq)
            else:
                ctx.seq_rm(seq)
        for ticket, _ in done:
            self.drop(ticket)
        self.seconds += time.perf_counter() - started
        return done

    def _decode(self, parts: list[tuple[Ticket, int, int]]) -> None:
        n = sum(end - start for _, start, end in parts)
        columns: list[Any] = [np.empty(n, np.int32) for _ in range(3)]
        tokens, pos, seqs = columns
        at = 0
        for seq, (ticket, start, end) in enumerate(parts):
            rows = slice(at, at + end - start)
            tokens[rows] = ticket.tokens[start:end]
            pos[rows] = np.arange(start, end)
            seqs[rows] = seq
            at = rows.stop
        self._ctx._decode(tokens, pos, np.ones(n, np.int32), seqs, np.ones(n, np.int8))

    def drop(self, ticket: Ticket) -> None:
        """A request is done, or given up."""
        self.queue.remove(ticket)
        self._begun.pop(ticket, None)

    def clear(self) -> list[Ticket]:
        """Give up everything; what that was."""
        left = list(self.queue)
        self.queue.clear()
        self._begun.clear()
        self._ctx.clear(data=False)
        return left

    def close(self) -> None:
        """Free the context."""
        self._ctx.close()


def _unit(vector: npt.NDArray[np.float64]) -> Embedding:
    length = math.sqrt(float(vector @ vector))
    return (vector / (length or 1.0)).astype(np.float32)
