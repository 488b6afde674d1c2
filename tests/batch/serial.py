"""A runner that answers one request after the other, for tests that are about everything but the runner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llamastate import Context, Model
from llamastate.batch import Output, Request, Result, TokenLogprob
from llamastate.errors import LlamaStateError, NotEnoughCellsError
from llamastate.sampler import Sampler


class SerialRunner:
    def __init__(self, model: Model, *, n_ctx: int = 512) -> None:
        self.model = model
        self.ctx = Context(model, n_ctx=n_ctx, n_threads=1)
        self.stopped = False
        self.facts: dict[str, Any] = {}

    def stop(self) -> None:
        self.stopped = True

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        self.stopped = False
        for request in requests:
            if self.stopped:
                return
            try:
                yield self.answer(request)
            except LlamaStateError as error:
                yield Result(request.id, error=error, meta=request.meta)

    def tokens(self, prompt: Any, template: Any) -> np.ndarray:
        if isinstance(prompt, str):
            return self.model.tokenize(prompt)
        if isinstance(prompt, np.ndarray):
            return prompt
        text = self.model.apply_chat_template(prompt, **template)
        return self.model.tokenize(text, add_special=False, parse_special=True)

    def answer(self, request: Request) -> Result:
        ids = self.tokens(request.prompt, request.template)
        if len(ids) > self.ctx.n_ctx:
            raise NotEnoughCellsError("too long", needed=len(ids), available=self.ctx.n_ctx)
        outputs = []
        for i in range(request.n):
            self.ctx.seq_rm(0)
            self.ctx.prefill(ids)
            with Sampler(self.model, request.sampling) as sampler:
                chosen: list[int] = []
                lps: list[TokenLogprob] = []
                reason = "length"
                while len(chosen) < request.max_tokens:
                    row = self.ctx.logits()
                    token = sampler.sample(self.ctx)
                    if self.model.is_eog(token):
                        reason = "stop"
                        break
                    chosen.append(token)
                    lp = row - np.logaddexp.reduce(row)
                    top = np.argsort(-lp)[: request.logprobs or 0]
                    piece = self.model.token_to_piece
                    lps.append(
                        TokenLogprob(token, piece(token), float(lp[token]), tuple((t, piece(t), lp[t]) for t in top))
                    )
                    if len(ids) + len(chosen) >= self.ctx.n_ctx:
                        reason = "full"
                        break
                    self.ctx.decode([token])
            text = self.model.detokenize(chosen)
            outputs.append(
                Output(i, text, np.array(chosen, np.int32), reason, lps if request.logprobs is not None else None)
            )
        return Result(request.id, tuple(outputs), n_prompt=len(ids), prompt_tokens=ids, meta=request.meta)
