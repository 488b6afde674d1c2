"""The guide's Python runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamastate import batchcli, cli
from llamastate.batch import metrics
from tests import models
from tests.children import ROOT

TEXT = (ROOT / "docs" / "batch.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, tmp_path: Path) -> None:
    (tmp_path / ".models").symlink_to(models.smollm2().parent)
    # two processes compute on two cores at once: threads that spin would keep each other waiting
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", EXAMPLES[number]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_flags_and_metrics_are_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run-batch", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out + batchcli._EPILOG))
    told = set(re.findall(r"`(--[a-z][a-z-]+)", TEXT))
    assert told <= known
    assert known - told <= {"--help", "--model", "--served-model-name", "--port", "--host"}
    for name in re.findall(r"llamastate:([a-z_]+)", str(metrics.__doc__)):
        assert name in TEXT or name.startswith("num_requests_")
