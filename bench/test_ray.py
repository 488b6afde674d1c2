"""Ray Data: what a second process costs and gives, and what an actor gains by a second batch under way."""

from __future__ import annotations

import pydoc_data.topics
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from bench.conftest import CORES
from llamastate.batch import BatchRunner, Request
from tests import models
from tests.interop.test_ray import ray  # noqa: F401  # Ray with room for two actors

N_PROMPTS, N_SHARED, N_GENERATE = 64, 782, 32
RUNNER = {"n_parallel": 32, "n_ctx": 8192, "flash_attn": "off"}


@pytest.fixture(scope="module")
def prefix(model) -> str:
    """About as long a text as the other benches share."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics)[:10])
    return str(model.detokenize(model.tokenize(text)[:N_SHARED]))


@pytest.mark.filterwarnings("ignore")
def test_two_actors(claim, model, prefix, ray):  # noqa: F811
    from llamastate.interop.ray import ProcessorConfig, build_processor, warm

    prompts = [
        f"{prefix}\n\nQuestion {37 * i % 101}: what does part {i} of this say, in a word?" for i in range(N_PROMPTS)
    ]
    with BatchRunner(model, n_threads=CORES, **RUNNER) as runner:
        started = time.perf_counter()
        results = list(runner.run(Request(str(i), p, max_tokens=N_GENERATE) for i, p in enumerate(prompts)))
        one = time.perf_counter() - started
    made_by_one = sum(result.n_generated for result in results)

    config = ProcessorConfig(
        models.smollm2(),
        engine_kwargs=RUNNER,
        batch_size=N_PROMPTS // 2,
        concurrency=2,
        sampling_params={"max_tokens": N_GENERATE, "temperature": 0},
    )
    started = time.perf_counter()
    config = warm(config, prefix)
    warmed = time.perf_counter() - started
    rows = ray.data.from_items([{"prompt": prompt} for prompt in prompts], override_num_blocks=2)
    started = time.perf_counter()
    found = build_processor(config)(rows).take_all()
    two = time.perf_counter() - started
    made = sum(row["num_generated_tokens"] for row in found)
    cached = sum(row["metrics"]["num_cached_tokens"] for row in found)
    total = sum(row["num_input_tokens"] for row in found)
    claim(
        80,
        f"{N_PROMPTS} prompts, {N_SHARED} shared tokens, by two Ray actors of one core each that find the prefix in "
        "Ray's object store, against one runner with both cores",
        f"{(made / two) / (made_by_one / one):.2f} ×: {made / two:.0f} against {made_by_one / one:.0f} tokens/s; "
        f"{two:.1f} s with the start of the actors, {warmed:.1f} s for the prefix; {cached / total:.3f} of "
        f"{total:,} prompt tokens not computed",
    )


def test_batches_under_way(claim, model, prefix):
    """Without Ray around it: what Ray calls from as many threads as batches may be under way."""
    from llamastate.interop.ray import ProcessorConfig
    from llamastate.interop.rayactor import Worker
    from llamastate.interop.rayrows import pack

    sizes = [4 + 37 * i % 61 for i in range(N_PROMPTS)]
    rows = [
        {"prompt": f"{prefix}\n\n{i}:", "sampling_params": {"max_tokens": n, "ignore_eos": True}}
        for i, n in enumerate(sizes)
    ]
    tables = [pack(pa.Table.from_pylist(rows[first : first + 16])) for first in range(0, N_PROMPTS, 16)]
    config = ProcessorConfig(
        models.smollm2(),
        engine_kwargs={"n_parallel": 16, "n_ctx": 8192, "flash_attn": "off"},
        num_cpus=CORES,
        sampling_params={"temperature": 0},
    )
    seconds = []
    for under_way in (1, 2):
        worker = Worker(config)
        list(worker(pack(pa.Table.from_pylist(rows[:1]))))  # the prefix, once
        started = time.perf_counter()
        with ThreadPoolExecutor(under_way) as pool:
            assert all(list(pool.map(lambda table, worker=worker: list(worker(table)), tables)))
        seconds.append(time.perf_counter() - started)
    n = sum(sizes)
    claim(
        81,
        f"{N_PROMPTS} prompts, 4 to 64 tokens generated, in batches of 16 to an actor that generates 16 at once: two "
        "batches under way against one after the other",
        f"{seconds[0] / seconds[1]:.2f} ×: {n / seconds[1]:.0f} against {n / seconds[0]:.0f} tokens/s",
    )
