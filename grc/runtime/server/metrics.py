"""Metrics in Prometheus' form: histograms by stage, and the counters that dashboards for inference servers read."""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.utils import floatToGoString

from grc.runtime.server.cache import Cache

SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("preprocess", "queue", "compute", "postprocess")


class Times:
    """A histogram that is written on the event loop alone: prometheus_client's own takes a lock for each of its counters,
    six times for every request."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many values do not exceed them, as Prometheus wants them."""
        names = [*(floatToGoString(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts), strict=True))


class ModelMetrics:
    """The histograms of one model."""

    def __init__(self) -> None:
        self.request = Times(SECONDS)
        self.stages = {stage: Times(SECONDS) for stage in STAGES}
        self.rows, self.merged = Times(COUNTS), Times(COUNTS)


class Metrics:
    """A registry of its own: several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        # By model, protocol and status: plain numbers, as in Times.
        self.requests: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.refusals = Counter("grc_refusals", "Requests that got no answer, by reason.", ["model", "reason"], **own)
        self.reloads = Counter("grc_version_loads", "Versions that were loaded.", ["model", "result"], **own)
        self.canary = Gauge("grc_canary_ok", "Whether the last golden request was answered rightly.", ["model"], **own)
        self.models: dict[str, ModelMetrics] = {}
        self.registry.register(Histograms(self.models, self.requests))

    def of(self, model: str) -> ModelMetrics:
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = ModelMetrics()
        return found

    def collect_from(self, versions: Callable[[], Iterable[Any]], caches: dict[str, Cache], waiting: Any) -> None:
        self.registry.register(Collected(versions, caches, waiting))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Histograms:
    """Every model's, in Prometheus' form, and the requests by status."""

    def __init__(self, models: dict[str, ModelMetrics], requests: dict[tuple[str, str, str], int]):
        self.models, self.requests = models, requests

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("grc_requests", "Requests by status.", labels=["model", "protocol", "code"])
        for labels, count in self.requests.items():
            requests.add_metric(labels, count)
        yield requests
        for name, text, which in (
            ("grc_request_duration_seconds", "From the whole request to its answer.", "request"),
            ("grc_batch_rows", "Rows of a batch that was computed.", "rows"),
            ("grc_batch_requests", "Requests of a batch that was computed.", "merged"),
        ):
            family = HistogramMetricFamily(name, text, labels=["model"])
            for model, metrics in self.models.items():
                times: Times = getattr(metrics, which)
                family.add_metric([model], times.buckets(), times.total)
            yield family
        stages = HistogramMetricFamily(
            "grc_stage_duration_seconds", "Time of a request in a stage.", labels=["model", "stage"]
        )
        for model, metrics in self.models.items():
            for stage, times in metrics.stages.items():
                stages.add_metric([model, stage], times.buckets(), times.total)
        yield stages


# Names of Triton's metrics, so that its dashboards and alerts work: name, what it says, the stage, a field of it.
FIELD = (
    ("nv_inference_request_success", "Requests that were answered.", "success", "count"),
    ("nv_inference_request_failure", "Requests that failed.", "fail", "count"),
    ("nv_inference_request_duration_us", "Microseconds of requests from arrival to answer.", "success", "ns"),
    ("nv_inference_queue_duration_us", "Microseconds of requests in a queue.", "queue", "ns"),
    ("nv_inference_compute_input_duration_us", "Microseconds of decoding and preprocessing.", "compute_input", "ns"),
    ("nv_inference_compute_infer_duration_us", "Microseconds of computing.", "compute_infer", "ns"),
    ("nv_inference_compute_output_duration_us", "Microseconds of postprocessing.", "compute_output", "ns"),
    ("nv_cache_num_hits_per_model", "Answers that were given again.", "cache_hit", "count"),
    ("nv_cache_num_misses_per_model", "Answers that had to be computed.", "cache_miss", "count"),
)


class Collected:
    """What is counted elsewhere anyway, read when somebody asks."""

    def __init__(self, versions: Callable[[], Iterable[Any]], caches: dict[str, Cache], waiting: Any):
        self.versions, self.caches, self.waiting = versions, caches, waiting

    def collect(self) -> Iterable[Metric]:
        versions = list(self.versions())
        labels = ["model", "version"]
        for name, text, stage, kind in FIELD:
            family = CounterMetricFamily(name, text, labels=labels)
            for version in versions:
                duration = version.statistics.by_stage[stage]
                value = duration.count if kind == "count" else duration.ns / 1000
                family.add_metric([version.name, version.number], value)
            yield family
        for name, text, attribute in (
            ("nv_inference_count", "Rows that were answered.", "rows"),
            ("nv_inference_exec_count", "Batches that were computed.", "batches"),
        ):
            family = CounterMetricFamily(name, text, labels=labels)
            for version in versions:
                family.add_metric([version.name, version.number], getattr(version.statistics, attribute))
            yield family
        pending = GaugeMetricFamily("nv_inference_pending_request_count", "Requests that wait.", labels=labels)
        for version in versions:
            pending.add_metric([version.name, version.number], self.waiting(version))
        yield pending
        yield from self.of_caches()

    def of_caches(self) -> Iterable[Metric]:
        lookups = CounterMetricFamily("grc_cache_lookups", "Look-ups in a cache.", labels=["cache", "result"])
        evicted = CounterMetricFamily("grc_cache_evictions", "Entries that made room.", labels=["cache"])
        held = GaugeMetricFamily("grc_cache_bytes", "Bytes that a cache holds.", labels=["cache"])
        entries = GaugeMetricFamily("grc_cache_entries", "Entries that a cache holds.", labels=["cache"])
        for name, cache in self.caches.items():
            lookups.add_metric([name, "hit"], cache.hits)
            lookups.add_metric([name, "miss"], cache.misses)
            lookups.add_metric([name, "changed"], cache.changed)
            evicted.add_metric([name], cache.evicted)
            held.add_metric([name], cache.bytes)
            entries.add_metric([name], len(cache.entries))
        yield from (lookups, evicted, held, entries)
