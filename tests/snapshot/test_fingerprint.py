"""What a state depends on is compared, and the first difference is named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest

from llamastate import (
    Adapter,
    Context,
    Fingerprint,
    FingerprintMismatchError,
    FingerprintUnavailableError,
    Model,
    Snapshot,
    gguf,
    require_same,
)
from llamastate._native import handles
from tests import tiny
from tests.helpers import KINDS, context, model, tokens
from tests.snapshot.image import FINGERPRINT

IDS = tokens(40)


def taken(**params: Any) -> Snapshot:
    with context(params.pop("model", "dense"), **params) as ctx:
        ctx.prefill(IDS)
        return Snapshot.take(ctx, 0, IDS)


@pytest.fixture(scope="module")
def usual() -> Snapshot:
    return taken()


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"model": model("dense", seed=1)}, "weights"),
        ({"model": model("iswa")}, "architecture"),
        ({"model": model("qwen2vl")}, "architecture"),
        ({"model": model("dense", n_layer=3)}, "weights"),
        ({"rope_scaling_type": "yarn"}, "rope_scaling"),
        ({"rope_freq_base": 5000.0}, "rope_freq_base"),
        ({"rope_freq_scale": 0.5}, "rope_freq_scale"),
        ({"yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"yarn_attn_factor": 2.0}, "yarn_attn_factor"),
        ({"yarn_orig_ctx": 128}, "yarn_orig_ctx"),
        ({"type_k": "f32"}, "type_k"),
        ({"type_k": "q8_0"}, "type_k"),
        ({"type_v": "q4_0", "flash_attn": "on"}, "type_v"),
        ({"flash_attn": "off"}, "v_trans"),
        ({"n_seq_max": 2, "kv_unified": False}, "n_streams"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mismatch_names_its_field(usual: Snapshot, params: dict[str, Any], field: str):
    """All but the first few would load in llama.cpp, and give nonsense."""
    params = dict(params)
    with context(params.pop("model", "dense"), **params) as ctx:
        ctx.prefill(IDS[:7])
        before = ctx.state_seq_get_data(0)
        with pytest.raises(FingerprintMismatchError) as caught:
            usual.restore(ctx, 0)
        error = caught.value
        assert error.field == field
        assert error.expected == getattr(usual.fingerprint, field)
        assert error.found == getattr(ctx.fingerprint, field)
        assert error.expected != error.found
        np.testing.assert_array_equal(ctx.state_seq_get_data(0), before)


@pytest.mark.parametrize("fields", ["yarn_beta_fast", "yarn_beta_slow"])
def test_yarn_only_counts_with_yarn(fields: str):
    plain, yarn = {fields: 3.0}, {fields: 3.0, "rope_scaling_type": "yarn"}
    assert taken(**plain).fingerprint == taken().fingerprint
    expected = taken(rope_scaling_type="yarn").fingerprint
    with pytest.raises(FingerprintMismatchError) as caught:
        require_same(expected, taken(**yarn).fingerprint)
    assert caught.value.field == fields


@pytest.mark.parametrize(
    "params",
    [
        {"n_ctx": 1024},
        {"n_batch": 64},
        {"n_ubatch": 32},
        {"n_seq_max": 4},
        {"flash_attn": "on"},
        {"kv_unified": False},  # of one sequence
        {"rope_freq_base": 10000.0},  # the model's own
        {"rope_freq_scale": 1.0},
        {"rope_scaling_type": "linear"},
        {"yarn_ext_factor": 0.0},
        {"yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0},  # what llama-cpp-python says
        {"on_busy": "raise"},
    ],
    ids=str,
)
def test_what_does_not_matter(usual: Snapshot, params: dict[str, Any]):
    with context("dense", **params) as ctx:
        assert ctx.fingerprint == usual.fingerprint
        assert usual.restore(ctx, 0) == 40


def test_each_field_alone():
    """Whatever differs is reported, in words, with both values."""
    other: dict[str, Any] = {
        "version": 2,
        "adapters": (),
        "yarn_beta_fast": 8.0,
        "yarn_beta_slow": "model",
        "yarn_orig_ctx": 5,
        "state_version": 4,
        "v_trans": True,
        "n_streams": 4,
    }
    for field in dataclasses.fields(Fingerprint):
        value = getattr(FINGERPRINT, field.name)
        changed = other[field.name] if field.name in other else value + ("x" if isinstance(value, str) else 1.0)
        found = dataclasses.replace(FINGERPRINT, **{field.name: changed})
        assert found.digest != FINGERPRINT.digest
        with pytest.raises(FingerprintMismatchError) as caught:
            require_same(FINGERPRINT, found)
        assert (caught.value.field, caught.value.expected, caught.value.found) == (field.name, value, changed)
        assert len(str(caught.value)) > 20
    require_same(FINGERPRINT, dataclasses.replace(FINGERPRINT))


@pytest.mark.parametrize("kind", KINDS)
def test_as_json(kind: str):
    with context(kind) as ctx:
        found = ctx.fingerprint
        assert Fingerprint.from_dict(json.loads(found.json)) == found
        assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))).digest == found.digest
        assert ctx.fingerprint is found  # remembered


def test_kinds_all_differ():
    found = [context(kind).fingerprint.digest for kind in KINDS]
    assert len(set(found)) == len(KINDS)


# --- weights --------------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, *, change: str | None = None, big: int = 0, **metadata: str) -> Path:
    """A copy of a model: with a tensor changed in its last byte, a large tensor more, other descriptions."""
    reader = writer.GGUFReader(source)
    out = writer.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        sub = field.types[1] if len(field.types) > 1 else None
        out.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, text in metadata.items():
        out.add_string(name.replace("__", "."), text)
    for tensor in reader.tensors:
        data = tensor.data.copy()
        if tensor.name == change:
            data.reshape(-1)[-1] += 0.5
        out.add_tensor(tensor.name, data)
    if big:
        out.add_tensor("extra.weight", np.ones((big, 256), np.float32))
    tiny.write(out)
    return target


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return rewritten(tiny.path("dense"), tmp_path / "plain.gguf")


def test_descriptions_do_not_count(plain: Path, tmp_path: Path):
    described = rewritten(
        plain,
        tmp_path / "described.gguf",
        general__description="the same",
        tokenizer__chat_template="{{ messages }}",
    )
    assert described.read_bytes() != plain.read_bytes()
    assert gguf.identify(str(described)).digest == gguf.identify(str(plain)).digest


def test_hyperparameters_count(plain: Path, tmp_path: Path):
    other = rewritten(plain, tmp_path / "other.gguf", llama__something="x")
    assert gguf.identify(str(other)).digest != gguf.identify(str(plain)).digest


@pytest.mark.parametrize("big", [0, 20000])
def test_one_changed_weight(plain: Path, tmp_path: Path, big: int):
    """Of a small model every byte counts; of a large one the ends of each tensor do, and samples between."""
    same = rewritten(plain, tmp_path / "same.gguf", big=big)
    again = rewritten(plain, tmp_path / "again.gguf", big=big)
    other = rewritten(plain, tmp_path / "other.gguf", big=big, change="blk.2.ffn_up.weight")
    assert gguf.identify(str(same)).digest == gguf.identify(str(again)).digest
    assert gguf.identify(str(same)).digest != gguf.identify(str(other)).digest


def test_samples_are_few():
    """However large the model: the work is bounded."""
    for n_bytes in (1 << 20, 1 << 30, 1 << 40):
        ranges = list(gguf._samples("blk.0.ffn_up.weight", n_bytes, whole=False))
        assert len(ranges) <= 16
        assert all(at >= 0 and at + size <= n_bytes for at, size in ranges)
        assert sum(size for _, size in ranges) <= 16 << 10
    assert list(gguf._samples("x", 100, whole=False)) == [(0, 100)]


def test_split_models(plain: Path, tmp_path: Path):
    """All parts count, and how a model is split does not."""
    reader = writer.GGUFReader(plain)
    halves = [reader.tensors[:20], reader.tensors[20:]]

    def split(stem: str, halves: list[Any]) -> str:
        for i, part in enumerate(halves):
            out = writer.GGUFWriter(tmp_path / f"{stem}-{i + 1:05d}-of-{len(halves):05d}.gguf", "llama")
            if i == 0:
                for name, field in reader.fields.items():
                    if not name.startswith("GGUF.") and name != "general.architecture":
                        out.add_key_value(name, field.contents(), field.types[0])
            out.add_uint16("split.no", i)
            out.add_uint16("split.count", len(halves))
            out.add_int32("split.tensors.count", len(reader.tensors))
            for tensor in part:
                out.add_tensor(tensor.name, tensor.data)
            tiny.write(out)
        return str(tmp_path / f"{stem}-00001-of-{len(halves):05d}.gguf")

    path = split("a", halves)
    assert gguf.identify(path).digest == gguf.identify(str(plain)).digest
    with Model(path) as parts, context(parts) as ctx, Model(plain) as whole, context(whole) as other:
        ctx.prefill(IDS)
        assert Snapshot.take(ctx, 0, IDS).restore(other, 0) == 40
    # the second part of another model
    other_reader = writer.GGUFReader(tiny.path("dense", seed=1))
    path = split("b", [halves[0], other_reader.tensors[20:]])
    assert gguf.identify(path).digest != gguf.identify(str(plain)).digest
    (tmp_path / "b-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError):
        gguf.identify(path)
    shutil.copy(tmp_path / "a-00001-of-00002.gguf", tmp_path / "renamed.gguf")
    with pytest.raises(gguf.GGUFError, match="parts"):
        gguf.identify(str(tmp_path / "renamed.gguf"))


def test_remembered_by_what_the_file_was(plain: Path):
    """A model whose file is replaced or deleted keeps its identity if it is known, and admits it if it is not."""
    with Model(plain) as known, Model(plain) as also_known:
        digest = known.identity.digest
        other = plain.with_name("new")
        rewritten(plain, other, change="output.weight")
        os.replace(other, plain)
        assert also_known.identity.digest == digest
        with Model(plain) as unknown:
            assert unknown.identity.digest != digest


def test_a_file_that_goes_after_it_was_loaded(plain: Path):
    gguf._known.clear()
    with Model(plain) as model, context(model) as ctx:
        plain.unlink()
        gguf._known.clear()
        ctx.prefill(IDS)
        assert Snapshot.take(ctx, 0, IDS).fingerprint == ctx.fingerprint


def test_a_file_that_is_replaced_while_it_is_loaded(plain: Path, monkeypatch: pytest.MonkeyPatch):
    load = handles.load_model

    def slowly(*args, **kwargs):
        other = plain.with_name("new")
        rewritten(plain, other, change="output.weight")
        os.replace(other, plain)
        return load(*args, **kwargs)

    monkeypatch.setattr(handles, "load_model", slowly)
    with Model(plain) as model, context(model) as ctx:
        with pytest.raises(FingerprintUnavailableError, match="replaced while it was being loaded"):
            ctx.fingerprint  # noqa: B018
        assert ctx.state_seq_get_data(0).size


def test_what_could_not_be_told_at_once(plain: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*args):
        raise OSError("no")

    gguf._known.clear()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "identify", fails)
        later, never = Model(plain), Model(plain)
    with later:
        assert later.identity.digest == gguf.identify(str(plain)).digest
    gguf._known.clear()
    with never as unknown, context(unknown) as ctx:
        ctx.prefill(IDS)
        os.utime(plain, ns=(1, 1))
        with pytest.raises(FingerprintUnavailableError) as caught:
            ctx.fingerprint  # noqa: B018
        assert caught.value.path == str(plain)
        plain.unlink()
        with pytest.raises(FingerprintUnavailableError):
            Snapshot.take(ctx, 0, IDS)
        assert ctx.state_seq_get_data(0).any()  # bare states need none


def test_a_path_that_means_something_else_by_now(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was loaded counts: neither another working folder nor a link that was turned changes it."""
    link = tmp_path / "link.gguf"
    link.symlink_to(plain)
    monkeypatch.chdir(tmp_path)
    with Model("link.gguf") as loaded:
        gguf._known.clear()
        link.unlink()
        link.symlink_to(tiny.path("dense", seed=1))
        monkeypatch.chdir("/")
        assert loaded.identity.digest == gguf.identify(str(plain)).digest


def test_a_cut_off_model(plain: Path, tmp_path: Path):
    """Of no length is there anything but one kind of error, or (inside the last tensor) another identity."""
    data = plain.read_bytes()
    digest = gguf.identify(str(plain)).digest
    errors = 0
    for i in range(200):
        cut = tmp_path / f"{i}.gguf"
        cut.write_bytes(data[: i * len(data) // 200])
        try:
            assert gguf.identify(str(cut)).digest != digest
        except gguf.GGUFError:
            errors += 1
    assert errors > 150


def test_random_models(plain: Path, tmp_path: Path):
    chance = np.random.default_rng(5)
    data = np.frombuffer(plain.read_bytes(), np.uint8)
    for i in range(300):
        bad = data[:200000].copy()
        places = chance.integers(0, 3000, 4)
        bad[places] = chance.integers(0, 256, 4)
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(bad.tobytes())
        with pytest.raises(gguf.GGUFError):
            gguf.identify(str(path))


# --- adapters and attachments are part of it ------------------------------------------------------------------------


def test_adapters_count(usual: Snapshot):
    adapter, other = (
        Adapter(model("dense"), tiny.lora("dense")),
        Adapter(model("dense"), tiny.lora("dense", lora_seed=1)),
    )
    found = []
    for chosen in ([], [(adapter, 1.0)], [(adapter, 0.5)], [(other, 1.0)], [(adapter, 1.0), (other, 1.0)]):
        with context("dense") as ctx:
            ctx.set_adapters(chosen)
            ctx.prefill(IDS)
            found.append(Snapshot.take(ctx, 0, IDS))
            expected = sorted((a.digest, s) for a, s in chosen)
            assert list(found[-1].fingerprint.adapters) == expected
    assert len({s.fingerprint.digest for s in found}) == len(found)
    assert found[0].fingerprint == usual.fingerprint
    with context("dense") as ctx:
        ctx.set_adapters([(other, 1.0), (adapter, 1.0)])  # in any order
        assert found[-1].restore(ctx, 0) == 40
        for snapshot in found[:-1]:
            with pytest.raises(FingerprintMismatchError) as caught:
                snapshot.restore(ctx, 0)
            assert caught.value.field == "adapters"
        assert ctx.seq_pos_max(0) == 39


def test_through_an_attachment(usual: Snapshot):
    """A state goes from a context of ours into a Llama and back: its defaults are ours."""
    from llama_cpp import Llama

    llm = Llama(str(tiny.path("dense")), n_ctx=512, n_threads=1, verbose=False, flash_attn=True)
    with Context.attach(llm) as ctx:
        assert ctx.fingerprint == usual.fingerprint
        assert usual.restore(ctx, 0) == 40
        assert Snapshot.take(ctx, 0, IDS).fingerprint == usual.fingerprint
    llm.close()
    llm = Llama(
        str(tiny.path("dense")),
        n_ctx=512,
        n_threads=1,
        verbose=False,
        flash_attn=True,
        rope_freq_base=5000.0,
        kv_overrides={"general.name": "x"},
    )
    with Context.attach(llm) as ctx:
        assert ctx.fingerprint.rope_freq_base == 5000.0
        assert ctx.fingerprint.overrides == '{"general.name": "x"}'
    llm.close()
