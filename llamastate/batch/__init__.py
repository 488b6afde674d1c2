"""Many prompts through one model: batched, with what they share computed once."""

from typing import TYPE_CHECKING, Any

from llamastate.batch.choices import flash_attn_for
from llamastate.batch.dicts import run_rows
from llamastate.batch.openai import Defaults
from llamastate.batch.pipeline import BatchSummary, run_batch
from llamastate.batch.progress import Progress, ProgressBar
from llamastate.batch.reading import Inline
from llamastate.batch.request import Embedding, Malformed, Output, Request, Result, Times, TokenLogprob
from llamastate.batch.runner import BatchRunner
from llamastate.batch.stats import BatchStats
from llamastate.batch.tables import run_table

if TYPE_CHECKING:
    from llamastate.batch.metrics import BatchMetrics

__all__ = [
    "BatchMetrics",
    "BatchRunner",
    "BatchStats",
    "BatchSummary",
    "Defaults",
    "Embedding",
    "Inline",
    "Malformed",
    "Output",
    "Progress",
    "ProgressBar",
    "Request",
    "Result",
    "Times",
    "TokenLogprob",
    "flash_attn_for",
    "run_batch",
    "run_rows",
    "run_table",
]


def __getattr__(name: str) -> Any:
    if name == "BatchMetrics":  # needs an extra
        from llamastate.batch.metrics import BatchMetrics

        return BatchMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
