"""What prefix stores do, for Prometheus. Needs the extra ``metrics``.

==========================================================  =======  ===================================================
name                                                        kind     what
==========================================================  =======  ===================================================
``llamastate:prefix_cache_queries_total``                   counter  tokens that were asked for
``llamastate:prefix_cache_hits_total``                      counter  tokens that were restored
``llamastate:prefix_store_loads_total{result}``             counter  loads: ``hit`` or ``miss``
``llamastate:prefix_store_restore_seconds``                 summary  how long loads that found something or not took
``llamastate:prefix_store_save_seconds``                    summary  how long callers waited in puts
``llamastate:prefix_store_stored_tokens_total``             counter  tokens that were new when they were put
``llamastate:prefix_store_stored_bytes_total``              counter  their bytes
``llamastate:prefix_store_read_bytes_total{tier}``          counter  bytes that came from ``disk`` or ``remote``
``llamastate:prefix_store_written_bytes_total{tier}``       counter  bytes that went there
``llamastate:prefix_store_evicted_entries_total{tier}``     counter  entries that had to go: ``ram``, ``disk``
``llamastate:prefix_store_evicted_bytes_total{tier}``       counter  their bytes
``llamastate:prefix_store_dropped_entries_total``           counter  entries that were not written for want of room
``llamastate:prefix_store_damaged_entries_total``           counter  entries that were given up: their bytes were wrong
``llamastate:prefix_store_remote_failures_total``           counter  calls of a remote place that failed
``llamastate:prefix_store_bytes{tier}``                     gauge    bytes that are stored
``llamastate:prefix_store_anchor_bytes{tier}``              gauge    those of them that are anchors
``llamastate:prefix_store_pinned_bytes{tier}``              gauge    those of them that are pinned (``disk``)
``llamastate:prefix_store_entries{tier}``                   gauge    blocks and anchors
``llamastate:prefix_store_limit_bytes{tier}``               gauge    what they may take, where there is a bound
==========================================================  =======  ===================================================

All of them have the label ``store``. Hit rates are the reader's to derive:
``rate(llamastate:prefix_cache_hits_total[5m]) / rate(llamastate:prefix_cache_queries_total[5m])``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llamastate.errors import ClosedError
from llamastate.prefix.stats import PrefixStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

    from llamastate.prefix.store import PrefixStore

__all__ = ["StoreCollector"]

Samples = Iterable[tuple[tuple[str, ...], Any]]


class _Family(NamedTuple):
    name: str
    kind: str
    text: str
    labels: tuple[str, ...]
    samples: Callable[[PrefixStats], Samples]


def _one(name: str) -> Callable[[PrefixStats], Samples]:
    return lambda s: [((), getattr(s, name))]


def _tiers(**names: str) -> Callable[[PrefixStats], Samples]:
    """Of each tier that there is its own number; ``ram`` has its names in the stats themselves."""

    def samples(stats: PrefixStats) -> Iterator[tuple[tuple[str, ...], Any]]:
        for tier, name in names.items():
            source = stats if tier == "ram" else getattr(stats, tier)
            value = None if source is None else getattr(source, name)
            if value is not None:
                yield (tier,), value

    return samples


def _timed(count: Callable[[PrefixStats], int], name: str) -> Callable[[PrefixStats], Samples]:
    return lambda s: [((), (count(s), getattr(s, name)))]


_CACHE, _STORE = "llamastate:prefix_cache_", "llamastate:prefix_store_"
_TIER = ("tier",)

_FAMILIES = (
    _Family(_CACHE + "queries", "counter", "Tokens asked for.", (), _one("query_tokens")),
    _Family(_CACHE + "hits", "counter", "Tokens restored.", (), _one("hit_tokens")),
    _Family(
        _STORE + "loads",
        "counter",
        "Loads, by whether anything was restored.",
        ("result",),
        lambda s: [(("hit",), s.hits), (("miss",), s.queries - s.hits)],
    ),
    _Family(
        _STORE + "restore_seconds", "summary", "Seconds in loads.", (), _timed(lambda s: s.queries, "load_seconds")
    ),
    _Family(_STORE + "save_seconds", "summary", "Seconds in puts.", (), _timed(lambda s: s.puts, "put_seconds")),
    _Family(_STORE + "stored_tokens", "counter", "Tokens that were new when put.", (), _one("stored_tokens")),
    _Family(_STORE + "stored_bytes", "counter", "Bytes that were new when put.", (), _one("stored_bytes")),
    _Family(_STORE + "read_bytes", "counter", "Bytes read.", _TIER, _tiers(disk="read_bytes", remote="read_bytes")),
    _Family(
        _STORE + "written_bytes",
        "counter",
        "Bytes written.",
        _TIER,
        _tiers(disk="written_bytes", remote="written_bytes"),
    ),
    _Family(
        _STORE + "evicted_entries", "counter", "Entries evicted.", _TIER, _tiers(ram="ram_evicted", disk="evictions")
    ),
    _Family(
        _STORE + "evicted_bytes",
        "counter",
        "Bytes evicted.",
        _TIER,
        _tiers(ram="ram_evicted_bytes", disk="evicted_bytes"),
    ),
    _Family(_STORE + "dropped_entries", "counter", "Entries not written for want of room.", (), _one("dropped")),
    _Family(
        _STORE + "damaged_entries",
        "counter",
        "Entries given up because their bytes were wrong.",
        (),
        lambda s: [((), s.damaged + (s.disk.damaged if s.disk else 0) + (s.remote.damaged if s.remote else 0))],
    ),
    _Family(
        _STORE + "remote_failures",
        "counter",
        "Calls of a remote place that failed.",
        (),
        lambda s: [((), s.remote.failures)] if s.remote else [],
    ),
    _Family(_STORE + "bytes", "gauge", "Bytes stored.", _TIER, _tiers(ram="ram_bytes", disk="bytes")),
    _Family(
        _STORE + "anchor_bytes",
        "gauge",
        "Bytes of anchors.",
        _TIER,
        _tiers(ram="ram_anchor_bytes", disk="anchor_bytes"),
    ),
    _Family(_STORE + "pinned_bytes", "gauge", "Bytes pinned.", _TIER, _tiers(disk="pinned_bytes")),
    _Family(_STORE + "entries", "gauge", "Blocks and anchors.", _TIER, _tiers(ram="ram_entries", disk="entries")),
    _Family(_STORE + "limit_bytes", "gauge", "What may be stored.", _TIER, _tiers(ram="ram_limit", disk="limit")),
)


class StoreCollector:
    """Numbers of prefix stores for a registry of ``prometheus_client``.

    Parameters
    ----------
    *stores : PrefixStore
        As by :meth:`add`.
    registry : prometheus_client.CollectorRegistry, optional
        Where to register; the library's own if not given.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    ValueError
        The registry has such a collector already: :meth:`add` the store to that one.

    Notes
    -----
    Does nothing until it is asked, and then looks at counters and one row of the index of each store. It keeps no store
    alive; one that is closed or gone is left out.

    Examples
    --------
    >>> StoreCollector(store)                      # doctest: +SKIP
    >>> prometheus_client.start_http_server(9100)  # doctest: +SKIP
    """

    def __init__(self, *stores: PrefixStore, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            message = "metrics need prometheus_client: pip install 'llamastate[metrics]'"
            raise ImportError(message, name="prometheus_client") from error
        self._lock = threading.Lock()
        self._stores: dict[str, weakref.ref[PrefixStore]] = {}
        for store in stores:
            self.add(store)
        (prometheus_client.REGISTRY if registry is None else registry).register(self)

    def add(self, store: PrefixStore, name: str | None = None) -> None:
        """Count this store too.

        Parameters
        ----------
        store : PrefixStore
        name : str, optional
            The label ``store``; its path if not given, or ``memory``. Takes the place of a store of that name.
        """
        with self._lock:
            self._stores[name or store.path or "memory"] = weakref.ref(store)

    def describe(self) -> Iterator[Metric]:
        """The names, without a look at any store."""
        return iter(_families().values())

    def collect(self) -> Iterator[Metric]:
        """All numbers of all stores that are open."""
        families = _families()
        with self._lock:
            stores = [(name, ref()) for name, ref in self._stores.items()]
        for name, store in stores:
            if store is None:
                continue
            try:
                stats = store.stats()
            except ClosedError:
                continue
            for family in _FAMILIES:
                for labels, value in family.samples(stats):
                    values = value if family.kind == "summary" else (value,)
                    families[family.name].add_metric([name, *labels], *values)
        return iter(families.values())


def _families() -> dict[str, Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

    kinds: dict[str, Any] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "summary": SummaryMetricFamily,
    }
    return {f.name: kinds[f.kind](f.name, f.text, labels=("store", *f.labels)) for f in _FAMILIES}
