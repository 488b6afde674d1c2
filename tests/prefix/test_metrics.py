"""Counters for Prometheus: what a scrape shows is what has happened."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import llamastate.prefix.metrics
from llamastate.prefix import PrefixStore, RemoteTier
from llamastate.prefix.metrics import StoreCollector
from tests import children
from tests.helpers import context, tokens

IDS = tokens(100)


def scrape(registry: prometheus_client.CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples by name and labels, as a server would read them."""
    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name.removeprefix("llamastate:prefix_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_has_happened(tmp_path: Path) -> None:
    registry = prometheus_client.CollectorRegistry()
    remote = RemoteTier(f"local://{tmp_path / 'far'}")
    with (
        context("iswa", n_seq_max=2) as ctx,
        PrefixStore(tmp_path / "near", block_tokens=16, remote=remote, disk_bytes=10**8, ram_bytes=10**7) as store,
    ):
        StoreCollector(store, registry=registry)
        store.load(ctx, 0, IDS)
        ctx.decode(IDS)
        store.put(ctx, 0, IDS)
        store.put(ctx, 0, IDS)
        assert store.load(ctx, 1, IDS) == 100
        store.flush()
        found = scrape(registry)
        near = ("store", str(tmp_path / "near"))
        stats = store.stats()

        def value(name: str, *labels: tuple[str, str]) -> float:
            return found[name, tuple(sorted((*labels, near)))]

        assert value("cache_queries_total") == 200
        assert value("cache_hits_total") == 100
        assert [value("store_loads_total", ("result", r)) for r in ("hit", "miss")] == [1, 1]
        assert (value("store_save_seconds_count"), value("store_restore_seconds_count")) == (2, 2)
        assert 0 < value("store_save_seconds_sum") < 60
        assert 0 < value("store_restore_seconds_sum") < 60
        assert value("store_stored_tokens_total") == 100
        sizes = [p.stat().st_size for p in tmp_path.glob("near/blocks/*/*")]
        assert len(sizes) == 7
        for name, tier in (("bytes", "ram"), ("bytes", "disk"), ("written_bytes_total", "remote")):
            assert value(f"store_{name}", ("tier", tier)) == sum(sizes)
        assert value("store_stored_bytes_total") == sum(sizes)
        assert value("store_entries", ("tier", "disk")) == 7
        assert value("store_anchor_bytes", ("tier", "disk")) == stats.disk.anchor_bytes > 0
        assert value("store_limit_bytes", ("tier", "disk")) == 10**8
        assert value("store_limit_bytes", ("tier", "ram")) == 10**7
        assert store.evict() == sum(sizes)
        found = scrape(registry)
        assert value("store_evicted_bytes_total", ("tier", "disk")) == sum(sizes)
        assert value("store_evicted_entries_total", ("tier", "disk")) == 7
        assert value("store_damaged_entries_total") == value("store_remote_failures_total") == 0
    assert scrape(registry) == {}


def test_several_stores() -> None:
    registry = prometheus_client.CollectorRegistry()
    one, other = PrefixStore(None), PrefixStore(None)
    collector = StoreCollector(one, registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        StoreCollector(other, registry=registry)
    collector.add(other, "other")
    names = {dict(labels)["store"] for _, labels in scrape(registry)}
    assert names == {"memory", "other"}
    del other
    gc.collect()
    assert {dict(labels)["store"] for _, labels in scrape(registry)} == {"memory"}
    one.close()


def test_what_the_page_says() -> None:
    """The table of names is complete, kinds and labels included."""
    registry = prometheus_client.CollectorRegistry()
    collector = StoreCollector(registry=registry)
    described = {}
    for family in collector.describe():
        total = "_total" if family.type == "counter" else ""
        labels = ",".join(name for name in family._labelnames if name != "store")
        described[family.name + total + (f"{{{labels}}}" if labels else "")] = family.type
    rows = re.findall(r"^``(llamastate:\S+)``\s+(\w+) ", llamastate.prefix.metrics.__doc__, re.MULTILINE)
    assert dict(rows) == described


def test_not_installed() -> None:
    code = """
import sys
sys.modules["prometheus_client"] = None
from llamastate.prefix import PrefixStore
from llamastate.prefix.metrics import StoreCollector
try:
    StoreCollector(PrefixStore(None))
except ImportError as error:
    print(error.name, "llamastate[metrics]" in str(error))
"""
    result = children.run(code)
    assert result.stdout == "prometheus_client True\n", result.stderr
