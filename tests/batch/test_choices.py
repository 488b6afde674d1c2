"""What is chosen where nobody says."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import Model
from llamastate.batch import BatchRunner, Defaults, Request, choices, flash_attn_for, rows, run_batch
from llamastate.batch.journal import Journal
from llamastate.batch.source import Source
from llamastate.errors import ContextCreateError, InvalidArgumentError
from tests import helpers, tiny
from tests.batch.lines import by_id, chat, write

LONG = "the of and to in is that it for was on as with he be at by this have from or one had not but all " * 3


def prompts_of(n: int, n_shared: int, n_own: int, n_made: int) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(7)
    shared = rng.integers(0, 1000, n_shared, dtype=np.int32)
    return [(np.concatenate([shared, rng.integers(0, 1000, n_own, dtype=np.int32)]), n_made) for _ in range(n)]


@pytest.mark.parametrize(
    ("workload", "n_parallel", "on", "off"),
    # seconds of SmolLM2 on two cores with AMX
    [
        ((64, 782, 18, 32), 8, 28.9, 10.0), ((64, 782, 18, 32), 16, 25.3, 9.3), ((64, 782, 18, 32), 32, 24.2, 10.7),
        ((48, 200, 60, 64), 8, 20.9, 15.0), ((48, 0, 100, 64), 16, 15.9, 25.7), ((48, 0, 100, 64), 32, 18.3, 35.1),
        ((24, 0, 400, 32), 8, 18.1, 43.5), ((24, 0, 400, 32), 16, 21.9, 64.7),
    ],
)  # fmt: skip
def test_as_measured(workload: tuple[int, ...], n_parallel: int, on: float, off: float) -> None:
    guessed = choices._costs(prompts_of(*workload), n_parallel, 8192)
    assert (guessed[1] < rows.CLEARLY * guessed[0]) is (off < on)


def test_groups_run_together() -> None:
    """In whatever order they come: each group's prefix is there once."""
    groups = [
        [(np.concatenate([[g], p]).astype(np.int32), n) for p, n in prompts_of(16, 400, 10, 32)] for g in range(4)
    ]
    mixed = [prompt for four in zip(*groups, strict=True) for prompt in four]
    assert choices._costs(mixed, 16, 8192) == choices._costs(list(chain(*groups)), 16, 8192)
    on, off = choices._costs(mixed, 16, 8192)
    assert off < rows.CLEARLY * on


def test_nothing_to_go_by() -> None:
    assert choices._costs([], 16, 8192) == (0, 0)
    m = helpers.model("chat")
    assert flash_attn_for(m, []) == "auto"
    assert flash_attn_for(m, [Request("a", "", max_tokens=4), Request("b", [{"role": 5}], max_tokens=4)]) == "auto"
    assert flash_attn_for(m, [Request(str(i), LONG, "embed") for i in range(40)]) == "auto"


def test_only_what_is_needed_is_read() -> None:
    n_read = 0

    def endless() -> Any:
        nonlocal n_read
        while True:
            n_read += 1
            yield Request(str(n_read), f"{LONG}{n_read}", max_tokens=64)

    assert flash_attn_for(helpers.model("chat"), endless(), n_parallel=4) == "off"
    assert n_read <= 17


@pytest.mark.parametrize("kind", ["iswa", "mamba", "jamba"])
def test_kinds_of_which_nothing_is_known(kind: str) -> None:
    requests = [Request(str(i), f"{LONG}{i}", max_tokens=64) for i in range(16)]
    assert flash_attn_for(helpers.model(kind), requests) == "auto"


def test_layers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is another matter, and more at once pays."""
    requests = [Request(str(i), f"{LONG}{i}", max_tokens=64) for i in range(16)]
    with Model(tiny.path("chat", vocab="spm"), n_gpu_layers=4) as m:
        assert flash_attn_for(m, requests) == "off"  # no GPU here, whatever was asked for
        assert choices.n_parallel_for(m) == 16
        monkeypatch.setattr(choices.handles, "gpu_alignments", lambda: [128])
        assert flash_attn_for(m, requests) == "auto"
        assert choices.n_parallel_for(m) == 32
    with BatchRunner(helpers.model("chat"), n_threads=1) as runner:
        assert runner._engine.rules.n_slots == 16
        assert runner._window == runner._engine.rules.patience == 64


# --- for files --------------------------------------------------------------------------------------------------------


def file_of(folder: Path, *, shared: bool, n: int = 12) -> Path:
    texts = [f"{LONG} {i}" if shared else f"{LONG[i:]}" for i in range(n)]
    write(folder / "in", [chat(f"r{i}", text, max_tokens=12, temperature=0) for i, text in enumerate(texts)])
    return folder / "in"


def transposed(output: Path) -> Any:
    return Journal(f"{output}.journal", {}).last_run.get("v_trans")


@pytest.mark.parametrize(("shared", "off"), [(True, True), (False, False)])
def test_a_file(tmp_path: Path, shared: bool, off: bool) -> None:
    m = helpers.model("chat")
    source = file_of(tmp_path, shared=shared)
    summary = run_batch(source, tmp_path / "out", model=m, n_parallel=4, n_ctx=2048, n_threads=1)
    assert (summary.completed, summary.failed) == (12, 0)
    assert transposed(tmp_path / "out") is off


@pytest.mark.parametrize("first", ["on", "off"])
def test_results_are_gone_on_with_as_they_were_begun(tmp_path: Path, first: str) -> None:
    """Whatever the requests say: results of one way do not go with those of the other."""
    m = helpers.model("chat")
    settings: dict[str, Any] = {"n_parallel": 4, "n_ctx": 2048, "n_threads": 1}
    source, out = file_of(tmp_path, shared=True), tmp_path / "out"
    run_batch(source, out, model=m, flash_attn=first, **settings)
    whole = by_id(out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:5]))
    (tmp_path / "link").symlink_to(out)
    summary = run_batch(source, tmp_path / "link", model=m, **settings)
    assert (summary.skipped, summary.completed) == (5, 7)
    assert by_id(out).keys() == whole.keys()
    assert transposed(out) is (first == "off")
    # begun anew, it is chosen anew
    run_batch(source, out, model=m, resume=False, **settings)
    assert transposed(out) is True


def test_done_again_with_the_other_and_back(tmp_path: Path) -> None:
    """The last run counts, also if there was one like it before the one before."""
    m = helpers.model("chat")
    settings: dict[str, Any] = {"model": m, "n_parallel": 4, "n_ctx": 2048, "n_threads": 1}
    source, out = file_of(tmp_path, shared=True), tmp_path / "out"
    for how in ("off", "on", "off"):
        run_batch(source, out, flash_attn=how, on_change="redo", **settings)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:5]))
    assert run_batch(source, out, **settings).skipped == 5


@pytest.mark.parametrize(
    "options",
    [{"n_parallel": -1}, {"n_parallel": "8"}, {"n_parallel": 1 << 62}, {"n_ctx": "4096"}, {"type_k": ["f16"]}],
)
def test_settings_that_cannot_be(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises((InvalidArgumentError, ContextCreateError)):
        run_batch(file_of(tmp_path, shared=True), tmp_path / "out", model=helpers.model("chat"), **options)
    assert not (tmp_path / "out").exists()


def test_requests_of_another_kind_are_not_all_read() -> None:
    n_read = 0

    def embeddings() -> Any:
        nonlocal n_read
        for n_read in range(1, 10_000):
            yield Request(str(n_read), LONG, "embed")

    assert flash_attn_for(helpers.model("chat"), embeddings(), n_parallel=4) == "auto"
    assert n_read <= 17
    no_request: Any = {"x": 1}
    assert flash_attn_for(helpers.model("chat"), [no_request]) == "auto"


def test_cells_are_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits does not depend on whether there is a GPU."""
    m = helpers.model("chat")
    monkeypatch.setattr(Model, "n_ctx_train", 32768)
    found = [choices.n_ctx_for(m, None)]
    monkeypatch.setattr(choices, "_on_processor", lambda _: False)
    assert [*found, choices.n_ctx_for(m, None)] == [16384, 16384]
    assert choices.n_ctx_for(m, 64) == 32768


def test_what_somebody_said_stays(tmp_path: Path) -> None:
    m = helpers.model("chat")
    source = Source(file_of(tmp_path, shared=True))

    def chosen(**options: Any) -> Any:
        return choices.settled(options, source, None, m, Defaults()).get("flash_attn")

    assert chosen(n_parallel=4) == chosen(n_parallel=4, flash_attn="auto", type_k="bf16") == "off"
    assert chosen(flash_attn="on") == "on"
    assert chosen(type_k="q8_0", type_v="q8_0") is None  # not to be had without
    assert chosen(fixed_shapes=True) is None
    source = Source([chat("a", LONG)])  # what comes once is not looked at
    assert chosen(n_parallel=4) is None


def test_lines_that_are_no_requests(tmp_path: Path) -> None:
    """They are somebody else's to tell."""
    source = file_of(tmp_path, shared=True)
    source.write_bytes(b"no json\n" + b'{"custom_id": "x", "body": 5}\n' + source.read_bytes())
    summary = run_batch(source, tmp_path / "out", model=helpers.model("chat"), n_parallel=4, n_ctx=2048, n_threads=1)
    assert (summary.completed, summary.failed) == (12, 2)
    assert transposed(tmp_path / "out") is True
