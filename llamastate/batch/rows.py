"""Whose tokens go into a batch, once there is room for them."""

from __future__ import annotations

from collections.abc import Iterable

from llamastate.batch.jobs import Job, Phase, Row

__all__ = ["fixed_rows", "mixed_rows"]


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
