"""How far a run is, and a bar that shows it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TextIO

__all__ = ["Progress", "ProgressBar"]


@dataclass
class Progress:
    """Where a run stands. The same object goes to every call of ``on_progress``, and counts on.

    Attributes
    ----------
    total : int or None
        Lines of the input, if that could be told.
    read, skipped : int
        Lines read; those of them whose results were there already.
    done, failed : int
        Results written by this run; those of them that are errors.
    prompt_tokens, cached_tokens, generated_tokens : int
        Of the results; cached are those of the prompts that were not computed.
    seconds : float
        Since the run began.
    """

    total: int | None = None
    read: int = 0
    skipped: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


class ProgressBar:
    """A line of the terminal: requests, time left, tokens per second, share of the prompts that was not computed.

    Parameters
    ----------
    file : text stream, optional
        Standard error if not given.
    seconds : float, optional
        Where it is no terminal, a line of its own is written so often at most; if not given, nothing is.
    """

    def __init__(self, file: TextIO | None = None, *, seconds: float | None = None) -> None:
        self._file = file if file is not None else sys.stderr
        self._seconds = seconds
        self._told = 0.0
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=progress.total, unit="req", file=self._file, disable=None, dynamic_ncols=True,
                initial=progress.skipped, smoothing=0.05,
            )  # fmt: skip
        if self._bar.disable:
            if self._seconds is not None and self._file is not None and progress.seconds - self._told >= self._seconds:
                self._told = progress.seconds
                of = "" if progress.total is None else f" of {progress.total}"
                print(f"{progress.done + progress.skipped}{of} done, {_shown(progress)}", file=self._file, flush=True)
            return
        # those skipped took no time: they are no part of the rate
        self._bar.initial = progress.skipped
        self._bar.set_postfix_str(_shown(progress), refresh=False)
        self._bar.update(progress.done + progress.skipped - self._bar.n)

    def close(self) -> None:
        """Leave the line as it is. Idempotent."""
        if self._bar is not None:
            self._bar.close()


def _shown(progress: Progress) -> str:
    shown = f"{progress.tokens_per_second:.0f} tok/s, {progress.hit_rate:.0%} shared"
    return shown + f", {progress.failed} failed" if progress.failed else shown
