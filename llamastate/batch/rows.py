"""Whose tokens go into a batch, once there is room for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llamastate.batch.jobs import Job, Phase, Row

__all__ = ["CLEARLY", "STEP_COST", "TILE", "fixed_rows", "mixed_rows", "tiles_are_dear"]

#: From so many rows on, flash attention on a processor goes through cells in tiles: a row pays for what any of its tile
#: can see.
TILE = 64
#: What a row takes for a cell in a smaller batch, where each goes through its own, in what it takes in a tile.
STEP_COST = 12
#: How much less something has to cost to be preferred: what is known of costs is rough.
CLEARLY = 0.8


def tiles_are_dear(steps: Sequence[Job], prompts: Sequence[Job], room: int, n_used: int) -> bool:
    """Whether those that generate had better not go with prompts: in tiles they would pay for each other's cells.

    Parameters
    ----------
    steps, prompts : sequence of Job
        That generate, and that are read.
    room : int
        Tokens that the batch may have.
    n_used : int
        Cells in use.
    """
    n_steps = len(steps)
    n_rows = min(room - n_steps, sum(job.n_prompt - job.held for job in prompts))
    if not n_steps or n_rows < 1 or n_steps + n_rows < TILE:
        return False
    of_steps = sum(job.held for job in steps)
    of_prompts = sum(job.n_prompt for job in prompts)
    # what a row of a tile can see, at most, and what it sees by itself
    in_steps, in_prompts, alone = min(of_steps, n_used), min(of_prompts, n_used), of_prompts / len(prompts)
    in_tiles = _whole_tiles(n_steps)
    together = in_tiles * in_steps + _whole_tiles(n_rows - (in_tiles - n_steps)) * in_prompts
    small = n_rows < TILE
    apart = STEP_COST * of_steps + (STEP_COST * n_rows * alone if small else _whole_tiles(n_rows) * in_prompts)
    return apart < CLEARLY * together


def _whole_tiles(n_rows: int) -> int:
    return -(-max(0, n_rows) // TILE) * TILE


def mixed_rows(steps: Iterable[Job], prompts: Iterable[Job], room: int) -> list[Row]:
    """As much of prompts as fits ``room`` tokens beside one token of all that generate.

    Prompts are first, for llama.cpp gives out cells from the lowest: the low ones are to be theirs who stay longest.
    Attention goes over all cells up to the last used one, and what has ended leaves gaps.
    """
    last = [Row(job, job.held, job.held + 1) for job in steps]
    rows = []
    left = room - len(last)
    for job in prompts:
        end = min(job.n_prompt, job.held + left)
        for stop in job.stops:
            if stop > job.held:
                end = min(end, stop)
                break
        if end > job.held:
            rows.append(Row(job, job.held, end))
            left -= end - job.held
    return rows + last


def fixed_rows(running: Iterable[Job], grid: int) -> list[Row]:
    """One chunk of one prompt, or a token of each: never both."""
    rows = []
    for job in running:
        if job.phase is Phase.PROMPT:
            return [Row(job, job.held, min(job.n_prompt, job.held - job.held % grid + grid))]
        if job.phase is Phase.GENERATE:
            rows.append(Row(job, job.held, job.held + 1))
    return rows
