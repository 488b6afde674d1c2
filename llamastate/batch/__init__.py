"""Many prompts through one model: batched, with what they share computed once."""

from llamastate.batch.request import Embedding, Malformed, Output, Request, Result, Times, TokenLogprob
from llamastate.batch.runner import BatchRunner, BatchStats

__all__ = [
    "BatchRunner",
    "BatchStats",
    "Embedding",
    "Malformed",
    "Output",
    "Request",
    "Result",
    "Times",
    "TokenLogprob",
]
