"""Batches on a real Ray: one local cluster for all of these tests."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from llamastate import LlamaStateError, Model, SamplingParams, Snapshot, errors
from llamastate.batch import BatchRunner, Output, Request, Result
from llamastate.errors import ClosedError, InvalidArgumentError, InvalidRequestError, ModelLoadError
from llamastate.interop import rayrows
from llamastate.interop.ray import ProcessorConfig, build_processor, warm
from llamastate.interop.rayactor import Given, Worker, of_user_code, prefill
from llamastate.prefix import PrefixStore
from tests import models, tiny

ROOT = Path(__file__).resolve().parent.parent.parent
COLUMNS = [
    "prompt", "prompt_token_ids", "num_input_tokens", "generated_tokens", "generated_text", "num_generated_tokens",
    "metrics", "request_id", "time_taken_llm", "params", "__inference_error__",
]  # fmt: skip
ENGINE = {"n_parallel": 4, "n_ctx": 8192, "fixed_shapes": True}
GREEDY = {"temperature": 0, "max_tokens": 6}
PREFIX = (
    "the of and to in is that it for was on as with he be at by this have from or one had not but all were when " * 8
)
CHAT = [{"role": "system", "content": "all of it"}, {"role": "user", "content": "is that so"}]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with room for two actors, and none for anything else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        # no home to write to, nothing to report, no memory of other people's to watch
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")
        # workers import what this process imports
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        # paths of sockets have 107 bytes, whatever TMPDIR is
        folder = tempfile.mkdtemp(
            prefix="r", dir=next(f for f in ("/tmp", "/var/tmp", None) if f is None or writable(f))
        )
        handler = signal.getsignal(signal.SIGTERM)
        before = set(psutil.Process().children(recursive=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data

            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=80 << 20,
                _temp_dir=folder,
            )
            context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield ray
        finally:
            ours = set(psutil.Process().children(recursive=True)) - before
            ray.shutdown()
            signal.signal(signal.SIGTERM, handler)
            _, alive = psutil.wait_procs(ours, timeout=20)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(folder, ignore_errors=True)
    assert not alive


def writable(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


@pytest.fixture
def config() -> ProcessorConfig:
    return ProcessorConfig(
        tiny.path("chat", vocab="spm"), engine_kwargs=ENGINE, batch_size=8, sampling_params=GREEDY, concurrency=2
    )


def answers(ray: Any, processor: Any, rows: list[dict[str, Any]], *, blocks: int = 4) -> list[dict[str, Any]]:
    """What becomes of the rows, in their order."""
    given = [{"number": i, **row} for i, row in enumerate(rows)]
    found = processor(ray.data.from_items(given, override_num_blocks=min(blocks, len(rows)))).take_all()
    assert sorted(row["number"] for row in found) == list(range(len(rows)))  # none is lost, and none is there twice
    return sorted(found, key=lambda row: row["number"])


def by_hand(config: ProcessorConfig, prompts: list[Any]) -> list[Output]:
    """The same outputs without Ray."""
    sampling = SamplingParams(temperature=0)
    kwargs = {"n_threads": 1, **config.engine_kwargs}
    with Model(config.model_source) as model, BatchRunner(model, **kwargs) as runner:
        results = runner.run(Request(str(i), p, max_tokens=6, sampling=sampling) for i, p in enumerate(prompts))
        return [result.outputs[0] for result in sorted(results, key=lambda result: int(result.id))]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_get_the_answers_of_a_runner(ray, config):
    """Text, messages and tokens, in two actors; and rows that fail leave the others alone."""
    prompts: list[Any] = [f"{PREFIX}{i}" for i in range(10)] + [CHAT, [3, 5, 300, 7], "with he"]
    rows = [
        {"messages": p} if p is CHAT else {"tokenized_prompt": p} if isinstance(p, list) else {"prompt": p}
        for p in prompts
    ]
    rows[-1]["sampling_params"] = {"max_tokens": 2}
    bad = [
        ({"prompt": ""}, "InvalidArgumentError: the prompt is empty"),
        ({"prompt": None}, "InvalidRequestError: there is no prompt"),
        ({"tokenized_prompt": [5, 600_000]}, "TokenizeError: "),
        ({"prompt": "a " * 3000}, "InvalidArgumentError: "),
        (
            {"prompt": "a", "sampling_params": {"max_tokens": 2, "wonder": 1}},
            "InvalidRequestError: there is no parameter",
        ),
        ({"prompt": "a", "sampling_params": {"temperature": -1}}, "InvalidRequestError: "),
        ({"prompt": "a", "sampling_params": {"n": 2}}, "InvalidRequestError: n can only be 1"),
        ({"prompt": "a", "sampling_params": {"logprobs": 1}}, "InvalidRequestError: logprobs"),
        ({"messages": [{"role": "user", "content": "a", "wonder": "b"}]}, "InvalidRequestError: "),
        ({"prompt": "a", "__inference_error__": "EarlierError: so it is"}, "EarlierError: so it is"),
    ]
    config = replace(config, should_continue_on_error=True)
    given = [{"extra": {"i": i}, **row} for i, row in enumerate([*rows, *(row for row, _ in bad)])]
    found = answers(ray, build_processor(config), given)
    expected = by_hand(config, prompts)
    with Model(config.model_source) as model:
        written = model.apply_chat_template(CHAT)
    for i, (row, output) in enumerate(zip(found, expected, strict=False)):
        n = 2 if i == 12 else 6
        assert [name for name in row if name in COLUMNS] == COLUMNS
        assert row["__inference_error__"] is None
        assert row["extra"] == {"i": i}
        assert row["generated_tokens"] == output.tokens[:n].tolist()
        assert row["num_generated_tokens"] == n
        assert row["metrics"]["finish_reason"] == "length"
        assert row["num_input_tokens"] == len(row["prompt_token_ids"])
        assert row["prompt"] == (written if prompts[i] is CHAT else prompts[i] if isinstance(prompts[i], str) else None)
        assert row["time_taken_llm"] > 0
        assert '"max_tokens":' + str(n) in row["params"]
        if n == 6:
            assert row["generated_text"] == output.text
    for row, (given, words) in zip(found[len(rows) :], bad, strict=True):
        assert row["__inference_error__"].startswith(words), row["__inference_error__"]
        assert (row["generated_tokens"], row["generated_text"], row["num_generated_tokens"]) == ([], "", 0)
        assert row["metrics"] is None
        assert row["extra"] is not None
        assert row["prompt"] == given.get("prompt")


def test_before_and_after(ray, config):
    """Rows that sample are drawn alike in every run, and equal ones differ; logprobs; what failed goes past the end."""
    processor = build_processor(
        replace(
            config,
            sampling_params={"temperature": 1.5, "logprobs": 2},
            logprobs=True,
            should_continue_on_error=True,
            concurrency=1,
        ),
        preprocess=lambda row: {"prompt": "the of " * row["times"], "sampling_params": {"max_tokens": 9}},
        postprocess=lambda row: {name: row[name] for name in ("number", "generated_tokens", "params", "logprobs")},
    )
    first = answers(ray, processor, [{"times": i} for i in (1, 1, 2, 0)], blocks=1)
    again = answers(ray, processor, [{"times": i} for i in (1, 1, 2, 0)], blocks=1)
    assert [row["generated_tokens"] for row in first] == [row["generated_tokens"] for row in again]
    assert first[0]["generated_tokens"] != first[1]["generated_tokens"]
    for row in first[:3]:
        assert row["__inference_error__"] is None
        assert "seed" in row["params"]
        assert [score["token"] for score in row["logprobs"]] == row["generated_tokens"]
        assert all(len(score["top"]) == 2 and score["logprob"] < 0 for score in row["logprobs"])
    assert first[3]["__inference_error__"] == "InvalidArgumentError: the prompt is empty"
    assert first[3]["times"] == 0


def test_embeddings(ray, config):
    texts = ["the of", "and to in", "the of"]
    config = replace(config, task_type="embed", concurrency=1)
    found = answers(ray, build_processor(config), [{"prompt": text} for text in texts], blocks=1)
    vectors = np.array([row["embeddings"] for row in found])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors[0], vectors[2])
    with Model(config.model_source) as model, BatchRunner(model, n_threads=1, **ENGINE) as runner:
        expected = [r.embedding for r in runner.run(Request(text, text, "embed") for text in texts[:2])]
    assert np.allclose(vectors[:2], expected, atol=1e-5)


# --- failures ---------------------------------------------------------------------------------------------------------


def table_of(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return rayrows.pack(pa.table({name: [row.get(name) for row in rows] for name in names}))


def test_batches_side_by_side(config):
    """A batch does not wait for the last row of the one before, and its failures are its own."""
    worker = Worker(replace(config, max_concurrent_batches=3))
    long = {"max_tokens": 700, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(list, worker(table_of([{"prompt": "the of", "sampling_params": long}])))
        while not worker._service._begun:
            time.sleep(0.001)
        (second,) = worker(table_of([{"prompt": "to in"}, {"prompt": "is"}]))
        with pytest.raises(InvalidRequestError, match="temperature"):
            list(worker(table_of([{"prompt": "all"}, {"prompt": "of", "sampling_params": {"temperature": -1}}])))
        (third,) = worker(table_of([{"prompt": "was", "__inference_error__": "before"}, {"prompt": "for"}]))
        assert not first.done()
        (first_table,) = first.result()
    assert first_table["num_generated_tokens"].to_pylist() == [700]
    assert third["__inference_error__"].to_pylist() == ["before", None]
    expected = [output.tokens.tolist() for output in by_hand(config, ["to in", "is", "for"])]
    found = second["generated_tokens"].to_pylist() + third["generated_tokens"].to_pylist()[1:]
    assert found == expected
    assert not next(iter(worker(table_of([{"prompt": "x"}]).slice(0, 0)))).num_rows


def test_a_batch_that_has_failed_is_not_read_on(config):
    worker = Worker(replace(config, engine_kwargs={**ENGINE, "n_parallel": 1}))
    bad = {"temperature": -1}
    rows = [{"prompt": "the", "sampling_params": bad}]
    rows += [{"prompt": f"of {i}", "sampling_params": {"max_tokens": 700, "ignore_eos": True}} for i in range(40)]
    with pytest.raises(InvalidRequestError, match="temperature"):
        list(worker(table_of(rows)))
    list(worker(table_of([{"prompt": "is"}])))
    assert worker._service._runner.stats.generated_tokens < 20 * 700


def test_the_store_is_waited_for_by_the_last_one_only(config, tmp_path, monkeypatch):
    """While others are under way there is no end to what is to be written."""
    worker = Worker(replace(config, store=tmp_path / "store"))
    flushed = []
    monkeypatch.setattr(worker._store, "flush", lambda: flushed.append(worker._service.idle))
    long = {"max_tokens": 700, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(list, worker(table_of([{"prompt": "the of", "sampling_params": long}])))
        while not worker._service._begun:
            time.sleep(0.001)
        list(worker(table_of([{"prompt": "is"}])))
        assert not first.done()
        assert not flushed
        first.result()
    assert flushed == [True]


def test_a_run_that_does_not_begin_is_told(config):
    worker = Worker(config)
    worker._service._runner.close()
    for _ in range(2):
        with pytest.raises(ClosedError):
            list(worker(table_of([{"prompt": "is"}])))
    assert worker._service.idle


def test_what_ends_the_run_fails_all_that_is_under_way(config, monkeypatch):
    """And nothing that comes afterwards."""
    worker = Worker(config)
    read = worker._service._reader.read

    def fails(table: Any, owner: Any) -> Any:
        if table.column("prompt")[0].as_py() == "bad":
            raise MemoryError("here")
        return read(table, owner)

    monkeypatch.setattr(worker._service._reader, "read", fails)
    with pytest.raises(MemoryError, match="here"):
        list(worker(table_of([{"prompt": "bad"}])))
    (table,) = worker(table_of([{"prompt": "is"}]))
    assert table["num_generated_tokens"].to_pylist() == [6]


def test_a_row_that_fails_fails_the_job(ray, config):
    processor = build_processor(replace(config, concurrency=1))
    with pytest.raises(InvalidRequestError) as caught:
        answers(ray, processor, [{"prompt": "the"}, {"prompt": "of", "sampling_params": {"wonder": 1}}], blocks=1)
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "wonder")


def test_a_model_that_is_not_there(ray, config, tmp_path):
    lost = replace(config, model_source=tmp_path / "none.gguf", concurrency=1)
    # in this order: the actors of a job that failed keep their cores for a while
    with pytest.raises(ModelLoadError, match=r"none\.gguf"):
        warm(lost, "the of")
    with pytest.raises(ModelLoadError, match=r"none\.gguf") as caught:
        answers(ray, build_processor(lost), [{"prompt": "the"}])
    assert caught.value.path == str(tmp_path / "none.gguf")


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_an_actor_that_is_killed(ray, config):
    """Its rows are done again, once, with the same answers."""
    config = replace(config, engine_kwargs={**ENGINE, "n_parallel": 2}, batch_size=4)
    rows = [
        {"number": i, "prompt": f"the of {i}", "sampling_params": {"max_tokens": 250, "ignore_eos": True}}
        for i in range(48)
    ]
    dataset = build_processor(config)(ray.data.from_items(rows, override_num_blocks=12))
    found: list[dict[str, Any]] = []
    killed = 0
    for batch in dataset.iter_rows():
        found.append(batch)
        if not killed:
            victim = actors()[0]
            victim.kill()
            killed = victim.pid
    assert killed
    assert sorted(row["number"] for row in found) == list(range(48))
    assert {(row["num_generated_tokens"], row["__inference_error__"]) for row in found} == {(250, None)}
    with Model(config.model_source) as model, BatchRunner(model, n_threads=1, **config.engine_kwargs) as runner:
        requests = (Request(str(row["number"]), row["prompt"], max_tokens=250, ignore_eos=True) for row in rows)
        expected = {int(r.id): r.outputs[0].tokens.tolist() for r in runner.run(requests)}
    assert {row["number"]: row["generated_tokens"] for row in found} == expected


def test_an_actor_that_cannot_live(ray, config):
    """What kills every actor is tried as often as was said, and then the job fails."""
    config = replace(config, max_task_retries=0, concurrency=1, engine_kwargs={**ENGINE, "n_parallel": 1})
    rows = [{"prompt": f"the of {i}", "sampling_params": {"max_tokens": 700, "ignore_eos": True}} for i in range(64)]
    dataset = build_processor(config)(ray.data.from_items(rows, override_num_blocks=16))
    with pytest.raises(ray.exceptions.RayError, match=r"died|unavailable"):
        kill_all_the_while(dataset)


def kill_all_the_while(dataset: Any) -> None:
    for _ in dataset.iter_rows():
        for process in actors():
            process.kill()


# --- prefixes ---------------------------------------------------------------------------------------------------------


def cached(rows: list[dict[str, Any]]) -> list[int]:
    return [row["metrics"]["num_cached_tokens"] for row in rows]


def test_actors_share_a_store(ray, config, tmp_path):
    rows = [{"prompt": f"{PREFIX}{i}"} for i in range(8)]
    config = replace(config, batch_size=4, store=tmp_path / "one", remote=str(tmp_path / "remote"))
    cold = answers(ray, build_processor(config), rows)
    n = min(row["num_input_tokens"] for row in cold)
    # another machine: its own disk, and what all have in common
    there = answers(ray, build_processor(replace(config, store=tmp_path / "two")), rows)
    assert min(cached(there)) >= n - n % 128 > 0
    assert [row["generated_tokens"] for row in there] == [row["generated_tokens"] for row in cold]
    # and another process on this one
    with (
        Model(config.model_source) as model,
        PrefixStore(tmp_path / "one") as store,
        BatchRunner(model, n_threads=1, store=store, **config.engine_kwargs) as runner,
    ):
        results = list(runner.run(Request(str(i), row["prompt"], max_tokens=6) for i, row in enumerate(rows)))
    assert min(result.n_cached for result in results) >= n - n % 128


def test_a_prefix_processed_once_for_all(ray, config):
    prepared = warm(replace(config, batch_size=2), PREFIX)
    snapshot = ray.get(prepared.prefixes[0])
    assert in_shared_memory(snapshot)
    prompts = [f"{PREFIX}{i}" for i in range(8)]
    found = answers(ray, build_processor(prepared), [{"prompt": prompt} for prompt in prompts])
    assert min(cached(found)) == snapshot.n_tokens == 128
    assert [row["generated_tokens"] for row in found] == [o.tokens.tolist() for o in by_hand(config, prompts)]


@pytest.mark.parametrize("kind", ["chat", "iswa", "mamba", "jamba"])
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_given_prefixes(config, kind, fixed_shapes):
    """Models of all kinds begin with a snapshot as with what they have processed themselves."""
    path = tiny.path(kind, vocab="spm")
    config = replace(config, model_source=path, engine_kwargs={**ENGINE, "fixed_shapes": fixed_shapes})
    chat = [*CHAT[:1], {"role": "user", "content": PREFIX}]
    prompts: list[Any] = [f"{PREFIX}{i}" for i in range(4)] + ["something else"]
    prompts += [[*chat, {"role": "assistant", "content": text}] for text in ("the", "of")]
    snapshots = [prefill(config, prefix)[1] for prefix in (PREFIX, chat, [3, 5, 7] * 50)]
    with (
        Model(path) as model,
        BatchRunner(model, n_threads=1, store=Given(snapshots), **config.engine_kwargs) as runner,
    ):
        results = sorted(
            runner.run(Request(str(i), p, max_tokens=6) for i, p in enumerate(prompts)), key=lambda r: int(r.id)
        )
    outputs = by_hand(config, prompts)
    for i, (result, output) in enumerate(zip(results, outputs, strict=True)):
        assert result.error is None
        n = snapshots[0 if i < 4 else 1].n_tokens
        assert result.n_cached == 0 if i == 4 else result.n_cached >= n > 100
        if fixed_shapes:
            assert result.outputs[0].tokens.tolist() == output.tokens.tolist()


def in_shared_memory(snapshot: Snapshot) -> bool:
    """Whether its bytes are where Ray's object store has them, not in memory of this process's own."""
    address = np.frombuffer(snapshot, np.uint8).ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if low <= address < high:
            return "plasma" in line
    return False


# --- what travels -----------------------------------------------------------------------------------------------------


def test_errors_and_results_travel(ray):
    for name in errors.__all__:
        error = getattr(errors, name)("so it is")
        for name in error.fields:
            setattr(error, name, 7)
        there = ray.get(ray.put(error))
        assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))
    tokens = np.arange(5, dtype=np.int32)
    result = Result("a", (Output(0, "text", tokens, "stop"),), None, 5, 3, tokens, error=ModelLoadError("no", path="x"))
    for there in (ray.get(ray.put(result)), pickle.loads(pickle.dumps(result))):
        assert there.outputs[0].tokens.tolist() == tokens.tolist()
        assert (there.id, there.n_cached, there.error.path) == ("a", 3, "x")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"concurrency": 0}, {"concurrency": (2, 1)}, {"concurrency": "2"}, {"batch_size": 0}, {"num_cpus": -1},
        {"max_concurrent_batches": 0},
        {"num_gpus": float("nan")}, {"task_type": "classify"}, {"engine_kwargs": None}, {"remote": 5}, {"store": 5},
        {"max_task_retries": -2}, {"model_source": 3}, {"seed": 1.5},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(field):
    with pytest.raises(InvalidArgumentError) as caught:
        ProcessorConfig(**{"model_source": "model.gguf", **field})
    assert caught.value.name == next(iter(field))


@pytest.mark.parametrize("name", ["engine_kwargs", "model_kwargs", "store_kwargs"])
def test_arguments_that_nobody_takes(name):
    with pytest.raises(InvalidArgumentError, match="'wonder'") as caught:
        build_processor(ProcessorConfig("model.gguf", **{name: {"wonder": 1}}))
    assert caught.value.name == name


def test_every_error_of_ours_can_be_one_of_ray():
    for name in errors.__all__:
        error = getattr(errors, name)("so it is")
        there = pickle.loads(pickle.dumps(of_user_code(error)))
        assert isinstance(there, type(error))
        assert isinstance(there, LlamaStateError)
        assert str(there) == "so it is"


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(2))
def test_examples_of_the_page(ray, number, tmp_path, monkeypatch, capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    (tmp_path / ".models").symlink_to(models.smollm2().parent)
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[number], "ray.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
