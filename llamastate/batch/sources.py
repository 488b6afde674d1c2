"""Which sequence a job takes its beginning from."""

from __future__ import annotations

from collections.abc import Iterable

from llamastate.arrays import Int32Array
from llamastate.batch.jobs import Job, Kept, Phase, Rules, Source
from llamastate.sessioncore import common_prefix

__all__ = ["best_source", "can_give", "n_roots", "n_waits", "on_grid"]

#: Tokens that are rather computed than waited for.
WAIT_COST = 8


def best_source(job: Job, holders: Iterable[Source], rules: Rules) -> tuple[Source | None, int]:
    """The sequence that has, or will have, most of what a job begins with, and how much of it.

    A few tokens are not waited for. Who waits for others runs out of step with them: then prompts come one by one where
    they could come together, while cells are many, and that costs more.
    """
    best: Source | None = None
    best_n = best_score = 0
    twin = job.twin_of
    cost = min(WAIT_COST, rules.min_share)
    for holder in holders:
        if holder is job or (isinstance(holder, Job) and not holder.share):
            continue
        n = common_prefix(holder.tokens, job.tokens)
        whole = twin is not None and n == job.n_prompt and (holder is twin or isinstance(holder, Kept))
        if not whole:
            n = on_grid(min(n, job.n_prompt - 1), rules.grid)
        if n < rules.min_share or n <= best_score:
            continue
        score = n if whole else n - cost * n_waits(holder, n)
        if score > best_score and can_give(holder, n, rules) and not _comes_of(holder, job):
            best, best_n, best_score = holder, n, score
    return best, best_n


def n_waits(source: Source, n: int) -> int:
    """How many sequences, one after the other, have to be decoded further before a source holds ``n`` tokens."""
    waits = 0
    while isinstance(source, Job) and source.source is not None:
        waits += n > source.fork_at
        n = min(n, source.fork_at)
        source = source.source
    return waits + (n > source.held)


def n_roots(prefixes: Iterable[Int32Array], held: Iterable[Int32Array], min_share: int) -> int:
    """How many of some prefixes are nowhere near what is held, nor near each other."""
    near = list(held)
    n = len(near)
    for prefix in prefixes:
        if not any(common_prefix(other, prefix) > len(prefix) - min_share for other in near):
            near.append(prefix)
    return len(near) - n


def can_give(holder: Source, n: int, rules: Rules) -> bool:
    """Whether the first ``n`` tokens of a sequence can be had from it, now or later."""
    if isinstance(holder, Kept):
        return n <= holder.held if rules.fork_anywhere else n == holder.held
    if rules.fork_anywhere:
        return True
    begins = holder.fork_at if holder.phase is Phase.PLACED and holder.source is not None else holder.held
    return begins <= n


def on_grid(n: int, grid: int | None) -> int:
    """As much of ``n`` tokens as is decoded in whole chunks."""
    return n if grid is None else n - n % grid


def _comes_of(holder: Source, job: Job) -> bool:
    """Whether a sequence will itself come of a job."""
    while isinstance(holder, Job) and holder.source is not None:
        holder = holder.source
        if holder is job:
            return True
    return False
