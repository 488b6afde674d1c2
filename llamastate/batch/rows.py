"""Whose tokens go into a batch, once there is room for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from llamastate.batch.jobs import Job, Phase, Row

__all__ = ["STEP_COST", "TILE", "fixed_rows", "mixed_rows", "tiles_are_dear"]

#: From so many rows on, flash attention on a processor goes through cells in tiles: a row pays for what any of its tile
#: can see.
TILE = 64
#: What a row takes for a cell in a smaller batch, where each goes through its own, in what it takes in a tile.
STEP_COST = 12


def tiles_are_dear(steps: Collection[Job], prompts: Iterable[Job], room: int, n_used: int) -> bool:
    """Whether those that generate had better not go with prompts: in tiles they would pay for each other's cells.

    Parameters
    ----------
    steps, prompts : collection of Job
        That generate, and that are read.
    room : int
        Tokens that the batch may have.
    n_used : int
        Cells in use.
    """
    n_rows = len(steps) + sum(job.n_prompt - job.held for job in prompts)
    if not steps or min(n_rows, room) < TILE:
        return False
    own = sum(job.held for job in steps)
    return STEP_COST * own < -(-len(steps) // TILE) * TILE * min(own, n_used)


def mixed_rows(steps: Iterable[Job], prompts: Iterable[Job], room: int) -> list[Row]:
    """One token of all that generate, and as much of prompts as fits ``room`` tokens."""
    rows = [Row(job, job.held, job.held + 1) for job in steps]
    left = room - len(rows)
    for job in prompts:
        end = min(job.n_prompt, job.held + left)
        for stop in job.stops:
            if stop > job.held:
                end = min(end, stop)
                break
        if end > job.held:
            rows.append(Row(job, job.held, end))
            left -= end - job.held
    return rows


def fixed_rows(running: Iterable[Job], grid: int) -> list[Row]:
    """One chunk of one prompt, or a token of each: never both."""
    rows = []
    for job in running:
        if job.phase is Phase.PROMPT:
            return [Row(job, job.held, min(job.n_prompt, job.held - job.held % grid + grid))]
        if job.phase is Phase.GENERATE:
            rows.append(Row(job, job.held, job.held + 1))
    return rows
