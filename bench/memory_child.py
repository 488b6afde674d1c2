"""How far one operation raises the memory of a process that does nothing else (``python -m bench.memory_child``).

Two meters, one run each: what Python's allocators were asked for (tracemalloc), and the high-water mark of resident
memory, which the kernel is asked to begin anew right before.
"""

from __future__ import annotations

import json
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llamastate import Context, Model

_STATUS = Path("/proc/self/status")


def main() -> None:
    """Read the task from stdin, print what was found."""
    task = json.load(sys.stdin)
    with Model(task["model"]) as model, Context(model, n_ctx=4096, n_seq_max=4, flash_attn="on", n_threads=1) as ctx:
        ctx.prefill(task["tokens"])
        buffer = np.zeros(ctx.state_seq_get_size(0), np.uint8)
        ctx.state_seq_get_data_into(buffer, 0)
        operations: dict[str, Callable[[], object]] = {
            "get": lambda: ctx.state_seq_get_data_into(buffer, 0),
            "set": lambda: ctx.state_seq_set_data(buffer, 0),
        }
        operation = operations[task["operation"]]
        operation()  # imports, schema and caches belong to the first call
        found = {"n_bytes": buffer.nbytes, "traced": traced(operation), "resident": resident(operation)}
    json.dump(found, sys.stdout)


def traced(operation: Callable[[], object]) -> int:
    """Bytes above what was allocated before, at the worst moment."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    operation()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def resident(operation: Callable[[], object]) -> int:
    """Bytes by which the peak of resident memory exceeds what was resident before."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():  # no Linux: the peak since the process began
        unit = 1 if sys.platform == "darwin" else 1024
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        operation()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
    clear.write_text("5")
    before = _status("VmRSS")
    operation()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
