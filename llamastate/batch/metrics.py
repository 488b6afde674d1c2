"""What a batch does, for Prometheus. Needs the extra ``metrics``.

===============================================  =========  ============================================================
name                                             kind       what
===============================================  =========  ============================================================
``llamastate:requests_total{status}``            counter    requests done: ``ok`` or ``error``
``llamastate:num_requests_running``              gauge      outputs that are being generated
``llamastate:num_requests_waiting``              gauge      those that wait for a sequence
``llamastate:num_requests_parked``               gauge      those that were put aside to make room
``llamastate:prompt_tokens_total``               counter    tokens of prompts
``llamastate:prompt_tokens_cached_total``        counter    those that were not computed for the request that brought
                                                            them
``llamastate:prompt_tokens_stored_total``        counter    tokens that came from the prefix store
``llamastate:generation_tokens_total``           counter    tokens generated
``llamastate:decode_calls_total``                counter    calls of ``llama_decode``
``llamastate:decoded_tokens_total``              counter    tokens in them
``llamastate:forks_total``                       counter    prefixes shared without computing or copying
``llamastate:preemptions_total``                 counter    outputs put aside to make room
``llamastate:kv_cache_usage_ratio``              gauge      the part of the cache's cells that is in use
``llamastate:busy_seconds_total{part}``          counter    where time goes: ``decode``, ``sample``, ``schedule``,
                                                            ``store``, ``prepare``
``llamastate:time_to_first_token_seconds``       histogram  from reading a request to its first token
``llamastate:request_queue_seconds``             histogram  from reading a request to its first decode
``llamastate:request_seconds``                   histogram  from reading a request to its result
===============================================  =========  ============================================================

Counters are of one runner, from when it was made. Rates are the reader's to derive:
``rate(llamastate:prompt_tokens_cached_total[5m]) / rate(llamastate:prompt_tokens_total[5m])`` is the share of prompts
that was not computed. A prefix store has metrics of its own (:mod:`llamastate.prefix.metrics`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llamastate.batch.request import Result
from llamastate.errors import FileAccessError, InvalidArgumentError

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

    from llamastate.batch.runner import BatchRunner

__all__ = ["BatchMetrics", "serve"]

_PREFIX = "llamastate:"
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "prompt_tokens_cached": ("cached_tokens", "Tokens of prompts that were not computed for their request."),
    "prompt_tokens_stored": ("stored_tokens", "Tokens that came from the prefix store."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "decode_calls": ("decodes", "Calls of llama_decode."),
    "decoded_tokens": ("decoded_tokens", "Tokens decoded."),
    "forks": ("forks", "Prefixes shared without computing or copying."),
    "preemptions": ("preemptions", "Outputs put aside to make room."),
}
_GAUGES = {
    "num_requests_running": ("running", "Outputs that are being generated."),
    "num_requests_waiting": ("waiting", "Outputs that wait for a sequence."),
    "num_requests_parked": ("parked", "Outputs put aside to make room."),
    "kv_cache_usage_ratio": ("kv_usage", "The part of the cache's cells that is in use."),
}
_PARTS = ("decode", "sample", "schedule", "store", "prepare")
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, float("inf"))


#: Whose metrics a registry has.
_registered: weakref.WeakKeyDictionary[Any, BatchMetrics] = weakref.WeakKeyDictionary()
_turn = threading.RLock()


class BatchMetrics:
    """Numbers of a runner for a registry of ``prometheus_client``.

    Parameters
    ----------
    runner : BatchRunner
        Not kept alive.
    registry : prometheus_client.CollectorRegistry, optional
        Where to register; the library's own if not given.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    InvalidArgumentError
        The registry has metrics of another runner that is not closed: :meth:`close` those, or give each a registry.

    Notes
    -----
    Metrics of a runner that is closed or gone make room for the next one's. Counters are read when they are asked for.
    Times are only known of results that :meth:`observe` is given.

    Examples
    --------
    >>> metrics = BatchMetrics(runner)                                      # doctest: +SKIP
    >>> run_batch(source, output, runner=runner, on_result=metrics.observe)  # doctest: +SKIP
    """

    def __init__(self, runner: BatchRunner, registry: CollectorRegistry | None = None) -> None:
        client = require_client()
        registry = client.REGISTRY if registry is None else registry
        self._registry: Any = registry
        self._runner = weakref.ref(runner)
        with _turn:
            before = _registered.get(registry)
            if before is not None:
                old = before._runner()
                if old is not None and not old.closed:
                    raise InvalidArgumentError(
                        "the registry has metrics of another runner: close those, or give each runner a registry",
                        name="registry", value=registry,
                    )  # fmt: skip
                before.close()
            self._register()
            _registered[registry] = self

    def _register(self) -> None:
        def histogram(name: str, text: str) -> Any:
            return require_client().Histogram(_PREFIX + name, text, buckets=_BUCKETS, registry=self._registry)

        self._first = histogram("time_to_first_token_seconds", "From reading a request to its first token.")
        self._queued = histogram("request_queue_seconds", "From reading a request to its first decode.")
        self._total = histogram("request_seconds", "From reading a request to its result.")
        self._registry.register(self)

    def close(self) -> None:
        """Take them out of the registry. Idempotent."""
        with _turn:
            if _registered.get(self._registry) is self:
                del _registered[self._registry]
                for metric in (self, self._first, self._queued, self._total):
                    self._registry.unregister(metric)

    def observe(self, result: Result) -> None:
        """Count how long a result took."""
        times = result.times
        for metric, seconds in ((self._first, times.first_token), (self._queued, times.queued)):
            if seconds is not None:
                metric.observe(seconds)
        self._total.observe(times.total)

    def describe(self) -> Iterator[Metric]:
        """The names, without a look at the runner."""
        return self._metrics(None)

    def collect(self) -> Iterator[Metric]:
        """All numbers as they are now."""
        runner = self._runner()
        return self._metrics(None if runner is None else runner.stats)

    def _metrics(self, stats: Any) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        requests = CounterMetricFamily(_PREFIX + "requests", "Requests done.", labels=["status"])
        busy = CounterMetricFamily(_PREFIX + "busy_seconds", "Seconds, by what for.", labels=["part"])
        if stats is not None:
            requests.add_metric(["ok"], stats.done)
            requests.add_metric(["error"], stats.failed)
            for part in _PARTS:
                busy.add_metric([part], getattr(stats, f"{part}_seconds"))
        yield requests
        yield busy
        for kinds, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, (field, text) in kinds.items():
                yield family(_PREFIX + name, text, value=None if stats is None else getattr(stats, field))


def serve(port: int, host: str = "127.0.0.1", registry: CollectorRegistry | None = None) -> Any:
    """Answer Prometheus at ``http://host:port/metrics``, in a thread.

    Parameters
    ----------
    port : int
        0 for any that is free.
    host : str
        Only this machine asks, if nothing else is said.
    registry : prometheus_client.CollectorRegistry, optional

    Returns
    -------
    server
        ``server.server_port`` is the port, ``server.shutdown()`` ends it.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    FileAccessError
        The port cannot be had.
    """
    client = require_client()
    try:
        server, _ = client.start_http_server(port, host, client.REGISTRY if registry is None else registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileAccessError(
            f"cannot listen on {host}:{port}: {reason}", path=f"{host}:{port}", reason=reason
        ) from None
    return server


def require_client() -> Any:
    """prometheus_client; an ImportError that says what to install if there is none."""
    try:
        import prometheus_client
    except ImportError as error:
        message = "metrics need prometheus_client: pip install 'llamastate[metrics]'"
        raise ImportError(message, name="prometheus_client") from error
    return prometheus_client
