"""How many cells of a unified cache are in use, counted without asking llama.cpp.

Sequences that were forked share the cells of what they have in common. So cells form a forest of runs: each sequence
points at the run in which it ends, and holds that and all runs above.
"""

from __future__ import annotations

__all__ = ["Cells", "Holder"]


class Run:
    """Cells of positions ``[start, end)``, used by everything below and by ``holders`` that end here."""

    __slots__ = ("end", "holders", "n_children", "parent", "start")

    def __init__(self, parent: Run | None, start: int, end: int) -> None:
        self.parent = parent
        self.start = start
        self.end = end
        self.n_children = 0
        self.holders: set[Holder] = set()
        if parent is not None:
            parent.n_children += 1


class Holder:
    """Whatever holds a sequence: ``held`` tokens of it are in the context."""

    __slots__ = ("held", "run")

    def __init__(self) -> None:
        self.held = 0
        self.run: Run | None = None


class Cells:
    """The ledger.

    Parameters
    ----------
    capacity : int or None
        Cells that there are; None where nobody competes for them.
    """

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.used = 0

    @property
    def free(self) -> int:
        """Cells that nobody uses."""
        return 1 << 62 if self.capacity is None else self.capacity - self.used

    def grow(self, holder: Holder, n: int) -> None:
        """A sequence has ``n`` tokens more."""
        run = holder.run
        if run is None or run.n_children or len(run.holders) > 1:
            if run is not None:
                run.holders.discard(holder)
            run = holder.run = Run(run, holder.held, holder.held)
            run.holders.add(holder)
        run.end += n
        holder.held += n
        self.used += n

    def fork(self, source: Holder, dest: Holder, n: int) -> None:
        """``dest``, which is empty, shares the first ``n`` tokens of ``source``."""
        run = source.run
        while run is not None and run.start >= n:
            run = run.parent
        if run is not None and run.end > n:
            run = self._split(run, n)
        dest.run = run
        dest.held = n
        if run is not None:
            run.holders.add(dest)

    def release(self, holder: Holder) -> None:
        """A sequence is emptied."""
        run = holder.run
        holder.run = None
        holder.held = 0
        if run is None:
            return
        run.holders.discard(holder)
        while run is not None and not run.holders and not run.n_children:
            self.used -= run.end - run.start
            run = run.parent
            if run is not None:
                run.n_children -= 1

    def _split(self, run: Run, n: int) -> Run:
        """Cut a run at ``n``; the new upper half. Whoever ends in ``run`` ends at its end, so it stays the lower."""
        upper = Run(run.parent, run.start, n)
        if run.parent is not None:
            run.parent.n_children -= 1  # the upper half has taken its place
        run.parent = upper
        upper.n_children = 1
        run.start = n
        return upper
