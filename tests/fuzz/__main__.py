"""Fuzz until the time is up: ``python -m tests.fuzz --minutes 60 --seed 1``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

from tests.fuzz.runner import ROOT, describe, run_for


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the clock by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=ROOT / ".cache" / "fuzz", help="where reproducers go")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    result = run_for(options.minutes, seed, options.processes, options.keep)
    print(describe(result))
    return bool(result.findings)


if __name__ == "__main__":
    sys.exit(main())
