"""The parent: starts children, and keeps what killed them."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.journal import Journal

ROOT = Path(__file__).resolve().parent.parent.parent


class Finding(NamedTuple):
    """A child that ended otherwise than it should."""

    what: str
    note: str
    reproducer: Path | None


class Result(NamedTuple):
    """What some children did, all together."""

    outcomes: collections.Counter[str]
    findings: list[Finding]


class Child:
    """One worker and its journal."""

    def __init__(self, folder: Path, seed: int, part: int, parts: int, *arguments: object) -> None:
        path = folder / f"journal-{seed}-{part}"
        self.journal = Journal(path, create=True)
        self.seed, self.part = seed, part
        command = [sys.executable, "-m", "tests.fuzz.worker", f"--seed={seed}", f"--part={part}", f"--parts={parts}"]
        command += [f"--journal={path}", *map(str, arguments)]
        self.errors = (folder / f"stderr-{seed}-{part}").open("w+")
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=self.errors)

    def wait(self, keep: Path) -> tuple[collections.Counter[str], Finding | None]:
        """Wait for its end; what is to be kept of it goes to ``keep``."""
        out, _ = self.process.communicate()
        note, data = self.journal.read()
        self.journal.close()
        self.errors.seek(0)
        said = self.errors.read()[-3000:]
        self.errors.close()
        try:
            report = json.loads(out.splitlines()[-1])
        except (IndexError, ValueError):
            report = {"wrong": f"it died with status {self.process.returncode}\n{said}", "outcomes": {}}
        finding = None
        if report["wrong"] is not None or self.process.returncode:
            keep.mkdir(parents=True, exist_ok=True)
            reproducer = keep / f"fuzz-{self.seed}-{self.part}"
            reproducer.with_suffix(".blob").write_bytes(data)
            text = f"{note}\n\n{report['wrong']}\n{report.get('trace', '')}\n{said}"
            reproducer.with_suffix(".txt").write_text(text)
            finding = Finding(f"{report['wrong']}\n{report.get('trace', '')}", note, reproducer.with_suffix(".blob"))
        return collections.Counter(report["outcomes"]), finding


def run(seed: int, processes: int, keep: Path, *arguments: object) -> Result:
    """Let ``processes`` children share the settings; wait for all of them."""
    result = Result(collections.Counter(), [])
    with tempfile.TemporaryDirectory(prefix="llamastate-fuzz-") as folder:
        children = [Child(Path(folder), seed, part, processes, *arguments) for part in range(processes)]
        for child in children:
            outcomes, finding = child.wait(keep)
            result.outcomes.update(outcomes)
            if finding is not None:
                result.findings.append(finding)
    return result


def run_for(minutes: float, seed: int, processes: int, keep: Path) -> Result:
    """Round after round, each with the next seed, until the time is up."""
    end = time.time() + 60 * minutes
    total = Result(collections.Counter(), [])
    while time.time() < end:
        found = run(seed, processes, keep, "--inputs=400", "--operations=150", f"--until={end}")
        total.outcomes.update(found.outcomes)
        total.findings.extend(found.findings)
        left = max(0.0, end - time.time()) / 60
        print(f"seed {seed}: {describe(total)}; {left:.1f} minutes left", flush=True)
        for finding in found.findings:
            print(f"FOUND {finding.note}\n{finding.what}\nkept in {finding.reproducer}", flush=True)
        seed += 1
    return total


def describe(result: Result) -> str:
    """In one line."""
    parts = ", ".join(f"{name} {count}" for name, count in result.outcomes.most_common())
    return f"{result.outcomes.total()} in all, {len(result.findings)} findings ({parts})"
