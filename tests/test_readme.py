"""The examples of the README and of docs/ run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pages whose examples follow upon each other, and run as one program.
STORIES = ("sessions",)
#: Pages with tests of their own (Ray tells on stderr what it does).
ELSEWHERE = ("batch", "ray")
EXAMPLES = {}
for page in PAGES:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if page.stem in ELSEWHERE:
        continue
    if page.stem in STORIES:
        blocks = ["\n".join(blocks)]
    EXAMPLES.update({f"{page.stem}-{number}": code for number, code in enumerate(blocks)})


def test_there_are_some():
    assert sum(name.startswith("README") for name in EXAMPLES) >= 3
    assert sum(name.startswith("log") for name in EXAMPLES) >= 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    (tmp_path / ".models").symlink_to(models.smollm2().parent)
    command = [sys.executable, "-c", EXAMPLES[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
