"""What a runner tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BatchStats"]


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What a runner has done since it was made, and what it is doing.

    Attributes
    ----------
    done, failed : int
        Requests that ended well, and with an error.
    running, waiting, parked : int
        Outputs that are being generated, wait for a sequence, were put aside to make room.
    prompt_tokens, cached_tokens : int
        Of the requests done: tokens of their prompts, and how many of them were not computed for them.
    stored_tokens : int
        Tokens that came from the store.
    generated_tokens : int
    decodes, decoded_tokens : int
        Calls of ``llama_decode`` that succeeded, and the tokens in them.
    forks, preemptions : int
    cells_used, cells_total : int
        Of the cache, as the scheduler counts.
    decode_seconds, sample_seconds, schedule_seconds, store_seconds, prepare_seconds : float
        Computing; choosing tokens and writing text; planning, forking and filling batches; reading and writing the
        store; tokenising and checking requests.
    """

    done: int
    failed: int
    running: int
    waiting: int
    parked: int
    prompt_tokens: int
    cached_tokens: int
    stored_tokens: int
    generated_tokens: int
    decodes: int
    decoded_tokens: int
    forks: int
    preemptions: int
    cells_used: int
    cells_total: int
    decode_seconds: float
    sample_seconds: float
    schedule_seconds: float
    store_seconds: float
    prepare_seconds: float

    @property
    def kv_usage(self) -> float:
        """The part of the cache's cells that is in use."""
        return self.cells_used / max(1, self.cells_total)

    @property
    def hit_rate(self) -> float:
        """The part of the prompts' tokens that was not computed for the request that brought them."""
        return self.cached_tokens / max(1, self.prompt_tokens)
