"""Moving a state takes no memory of its own: measured in a child process, by Python's allocator and by the kernel."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import models


@pytest.mark.parametrize(("row", "operation", "name"), [(6, "get", "get_data_into"), (7, "set", "set_data")])
def test_extra_memory(claim, tokens, row, operation, name):
    worst, texts = 0.0, []
    for n in (512, len(tokens)):
        task = {"model": str(models.smollm2()), "tokens": tokens[:n].tolist(), "operation": operation}
        child = [sys.executable, "-m", "bench.memory_child"]
        done = subprocess.run(child, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        traced, resident, size = (found[key] / 1e6 for key in ("traced", "resident", "n_bytes"))
        worst = max(worst, traced, resident)
        texts.append(
            f"{traced:.3f} (Python's allocators) and {resident:.3f} (peak resident) for {size:.1f} MB of state"
        )
    claim(row, f"extra memory of state_seq_{name}", f"{worst:.3f} MB: {'; '.join(texts)}", worst, 1, unit="MB")
