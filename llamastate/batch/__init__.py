"""Many prompts through one model: batched, with what they share computed once."""

from llamastate.batch.request import Embedding, Malformed, Output, Request, Result, Times, TokenLogprob

__all__ = ["Embedding", "Malformed", "Output", "Request", "Result", "Times", "TokenLogprob"]
