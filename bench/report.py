"""Claims, and the one table of them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np

from llamastate import native_version

__all__ = ["FOLDER", "QUIET", "Claim", "Report"]

FOLDER = Path(__file__).resolve().parent / "results"

#: Share of the machine's processor time that other programs may take; above it ratios are noise.
QUIET = 0.03


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table.

    Parameters
    ----------
    row : int
        Where it stands in the table.
    claim, measured : str
        What is claimed, and the figures with their units.
    value : float or None
        The figure that is held against the bar; None if it could not be had.
    limit : float or None
        The bar; None for what is only reported.
    at_least : bool
        Whether the bar is a lower one.
    unit : str
        Of the bar: "×", "MB", "%", "µs".
    """

    row: int
    claim: str
    measured: str
    value: float | None = None
    limit: float | None = None
    at_least: bool = False
    unit: str = "×"

    @property
    def bar(self) -> str:
        if self.limit is None:
            return "–"
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}"

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar. What could not be measured is not met."""
        if self.limit is None:
            return None
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return "–"
        if self.value is None:
            return "not measured"
        if self.met:
            return "yes"
        missing = 1 - self.value / self.limit if self.at_least else self.value / self.limit - 1
        return f"missed by {100 * missing:.1f} %"


class Report:
    """The claims of one run, and the circumstances."""

    def __init__(self) -> None:
        self._before = _busy()
        #: Share of the processor time of this run that other programs took.
        self.others = 0.0
        self.claims: list[Claim] = []
        self.facts: dict[str, str | float] = {
            "date": time.strftime("%Y-%m-%d"),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "llama.cpp": f"{native_version()['llama']} (ggml {native_version()['ggml']})",
            "load_before": round(os.getloadavg()[0], 2),
        }

    def finish(self) -> None:
        """Order the rows, write ``results/latest.json`` and ``latest.md``."""
        self.claims.sort(key=lambda claim: claim.row)
        if self._before is not None and (after := _busy()) is not None:
            (all_before, ours_before), (all_after, ours_after) = self._before, after
            mine = ours_after - ours_before
            self.others = max(0.0, all_after - all_before - mine) / max(1e-9, all_after - all_before)
            self.facts["others"] = round(self.others, 3)
        FOLDER.mkdir(exist_ok=True)
        rows = [{**dataclasses.asdict(c), "bar": c.bar, "met": c.met, "verdict": c.verdict} for c in self.claims]
        data = json.dumps({"machine": self.facts, "claims": rows}, indent=1, ensure_ascii=False)
        FOLDER.joinpath("latest.json").write_text(data + "\n", encoding="utf-8")
        FOLDER.joinpath("latest.md").write_text(self.markdown(), encoding="utf-8")

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else ran beside."""
        return self.others < QUIET

    def circumstances(self) -> str:
        """One line: the machine, the versions, whether it was quiet."""
        f = self.facts
        line = (
            f"{f['processor']}, {f['cores']} cores, Python {f['python']}, llama.cpp {f['llama.cpp']}, "
            f"load before {f['load_before']}, {100 * self.others:.1f} % of the processor time went to others"
        )
        return line if self.is_quiet else f"{line}: take these figures for noise"

    def markdown(self) -> str:
        """The table for a README."""
        lines = ["| what | measured | bar | met |", "|---|---|---|---|"]
        lines += [f"| {c.claim} | {c.measured} | {c.bar} | {c.verdict} |" for c in self.claims]
        return "\n".join([*lines, "", self.circumstances(), ""])

    def text(self, width: int) -> list[str]:
        """The table for a terminal: as wide as it needs, wrapped in its first two columns if that is too wide."""
        head = ("claim", "measured", "bar", "met?")
        rows = [(c.claim, c.measured, c.bar, c.verdict) for c in self.claims]
        fixed = [max(len(row[i]) for row in (head, *rows)) for i in (2, 3)]
        room = max(60, width - sum(fixed) - 9)
        first = min(max(len(row[0]) for row in (head, *rows)), room // 2)
        widths = [first, min(max(len(row[1]) for row in (head, *rows)), room - first), *fixed]
        lines = [_line(head, widths), "-+-".join("-" * w for w in widths)]
        for row in rows:
            cells = [_wrap(text, w) for text, w in zip(row, widths, strict=True)]
            lines += [_line(part, widths) for part in zip_longest(*cells, fillvalue="")]
        return [*lines, "", self.circumstances(), f"written to {FOLDER / 'latest.json'} and latest.md"]


def _line(cells: Iterable[str], widths: list[int]) -> str:
    return " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _busy() -> tuple[float, float] | None:
    """Seconds of processor time used on this machine, and by this process and its children; None if nobody says."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), ours


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
