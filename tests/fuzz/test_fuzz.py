"""A fixed dose of ``python -m tests.fuzz``: twenty thousand damaged states and files, and a few thousand operations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llamastate import errors
from tests.fuzz import runner, world
from tests.fuzz.mutate import HOW, Blob, mutate
from tests.fuzz.world import PATHS, SETTINGS, Settings, World, WrongError, apply, make_case

SEED = 20261121
INPUTS = 345  # for each of the 60 settings
OPERATIONS = 100
PROCESSES = 2

pytestmark = pytest.mark.fuzz


@pytest.mark.slow
def test_damaged_states_and_files(tmp_path: Path):
    result = runner.run(SEED, PROCESSES, tmp_path, f"--inputs={INPUTS}")
    print(runner.describe(result))
    assert not result.findings, "\n".join(f"{f.note}\n{f.what}" for f in result.findings)
    assert result.outcomes.total() == INPUTS * len(SETTINGS) >= 20_000
    # It is of no use to damage everything so badly that only the first check is tried, or so little that all is taken.
    for name in ("BadMagicError", "CorruptStateError", "LayoutMismatchError", "OnDeviceStateError", "accepted"):
        assert result.outcomes[name] > INPUTS
    for name in ("InvalidFlagsError", "InvalidSequenceError", "VersionMismatchError", "NotEnoughCellsError"):
        assert result.outcomes[name] > 0
    assert all(
        name == "accepted" or issubclass(getattr(errors, name), errors.LlamaStateError) for name in result.outcomes
    )


@pytest.mark.slow
def test_operations(tmp_path: Path):
    result = runner.run(SEED, PROCESSES, tmp_path, f"--operations={OPERATIONS}")
    print(runner.describe(result))
    assert not result.findings, "\n".join(f"{f.note}\n{f.what}" for f in result.findings)
    assert result.outcomes.total() == OPERATIONS * len(SETTINGS)
    for name in (
        "decode",
        "seq_rm",
        "seq_cp",
        "shift",
        "put",
        "device",
        "whole",
        "put LoadError",
        "take PendingUpdateError",
    ):
        assert result.outcomes[name] > 0


# --- whether the fuzzer would see anything ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path):
    found = World(Settings("iswa", "on", 4, True), tmp_path)
    yield found
    found.close()


def test_a_case_can_be_repeated(small: World):
    donors = list(small.donors())
    cases = [[make_case(random.Random(f"{n}"), small, donors) for n in range(100)] for _ in range(2)]
    assert cases[0] == cases[1]
    assert {case.path for case in cases[0]} == set(PATHS)


def test_every_mutation_is_tried():
    source = Blob(bytes(range(200)), range(50))
    names = {mutate(random.Random(n), source, [bytes(300), b"x" * 40])[1] for n in range(2000)}
    assert {name for joined in names for name in joined.split("+")} == {how.__name__ for how in HOW}


def test_a_changed_context_is_seen(small: World, monkeypatch: pytest.MonkeyPatch):
    case = world.Case("sequence", small.sources["sequence"][1].data[:-1], 0, 0, "by hand")
    assert apply(small, case) == "CorruptStateError"
    monkeypatch.setattr(world, "_feed", lambda world, case: _empty_and_refuse(world))
    with pytest.raises(WrongError, match="changed the context"):
        apply(small, case)


def _empty_and_refuse(world: World) -> None:
    world.ctx.seq_rm(0)
    raise errors.LoadError("refused")


def test_a_wrong_success_is_seen(small: World, monkeypatch: pytest.MonkeyPatch):
    case = world.Case("sequence", small.sources["sequence"][1].data, 0, 0, "by hand")
    assert apply(small, case, decode=True) == "accepted"
    for wrong, said in (
        (lambda ctx: ctx.state_seq_set_data(small.before[0], 0), "positions"),
        (lambda ctx: (ctx.state_seq_set_data(case.data, 0), ctx.seq_rm(1)), "another one"),
        (lambda ctx: (ctx.seq_rm(0), ctx.decode(range(40), seq_id=0)), "other bytes"),
    ):
        monkeypatch.setattr(world, "_feed", lambda world, case, wrong=wrong: wrong(world.ctx))
        with pytest.raises(WrongError, match=said):
            apply(small, case)


def test_an_error_of_another_kind_is_seen(small: World, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise IndexError("no error of ours")

    monkeypatch.setattr(world, "_feed", fail)
    with pytest.raises(WrongError, match="IndexError instead"):
        apply(small, world.Case("whole", b"", 0, 0, "by hand"))


def test_a_death_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A child that aborts leaves its last input behind."""
    (tmp_path / "child").mkdir()
    child = runner.Child(tmp_path / "child", 1, 0, 1, "--inputs=100000")
    while not child.journal.read()[0]:
        assert child.process.poll() is None
    child.process.kill()
    outcomes, finding = child.wait(tmp_path / "kept")
    assert not outcomes
    assert finding is not None
    assert "status -9" in finding.what
    assert "seed 1/" in finding.note
    assert finding.reproducer is not None
    assert finding.reproducer.exists()
    assert finding.note in finding.reproducer.with_suffix(".txt").read_text()
