"""What the benches share: the model, a context that holds 2,048 tokens, and the table at the end."""

from __future__ import annotations

import os
import pydoc_data.topics
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench.raw import CACHE
from bench.report import Claim, Report
from llamastate import Context, Model
from tests import models

#: Tokens whose state is moved about.
N_TOKENS = 2048
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

report = Report()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable_gc = True
    config.option.benchmark_quiet = True  # its table knows one side of each comparison only


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not report.claims:
        return
    report.finish()
    terminalreporter.section("what llamastate costs")
    for line in report.text(shutil.get_terminal_size((140, 24)).columns):
        terminalreporter.write_line(line)


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``claim(row, text, measured, ...)``: put a row into the table, and print it now."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")

    def add(*args: object, **fields: object) -> None:
        row = Claim(*args, **fields)  # type: ignore[arg-type]
        report.claims.append(row)
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"  {row.claim}: {row.measured}  [{row.bar}: {row.verdict}]")

    return add


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    """SmolLM2-135M-Instruct, Q4_1."""
    with Model(models.smollm2()) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tokens(model: Model) -> npt.NDArray[np.int32]:
    """2,048 tokens of real text: Python's own documentation."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:40])
    return model.tokenize(text[: 8 * N_TOKENS])[:N_TOKENS]


@pytest.fixture(scope="session")
def new_context(model: Model) -> Callable[..., Context]:
    """A context as every bench has it: f16, flash attention on, unified."""

    def make(**params: object) -> Context:
        settings: dict[str, object] = {"n_ctx": 4096, "n_seq_max": 4, "flash_attn": "on", "n_threads": CORES}
        return Context(model, **{**settings, **params})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def ctx(new_context: Callable[..., Context], tokens: npt.NDArray[np.int32]) -> Iterator[Context]:
    """A context whose sequence 0 holds the 2,048 tokens; benches leave it so. The other three are empty."""
    with new_context() as context:
        context.prefill(tokens)
        yield context


@pytest.fixture(scope="session")
def blob(ctx: Context) -> npt.NDArray[np.uint8]:
    """The state of those tokens, in pages that have been touched."""
    out = np.zeros(ctx.state_seq_get_size(0), np.uint8)
    ctx.state_seq_get_data_into(out, 0)
    return out


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on the disk that holds the checkout: /tmp may be memory."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as path:
        yield Path(path)
