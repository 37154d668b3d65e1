"""Metrics as Prometheus reads them: histograms that add up, under names that its parser takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from prometheus_client.parser import text_string_to_metric_families

from grc.errors import InputError
from grc.runtime.server.metrics import COUNTS, SECONDS, Metrics, Times
from grc.runtime.server.service import Service
from grc.runtime.server.statistics import Statistics


def test_a_histogram_counts_what_does_not_exceed_its_bounds() -> None:
    times = Times((1, 2, 4))
    for value in (0.5, 1, 1.5, 2, 3, 4, 5):
        times.observe(value)
    assert times.buckets() == [("1.0", 2), ("2.0", 4), ("4.0", 6), ("+Inf", 7)]
    assert times.total == 17


def test_what_is_exposed_can_be_read_back() -> None:
    metrics = Metrics()
    found = metrics.of("m")
    found.request.observe(0.003)
    found.stages["queue"].observe(0.2)
    found.rows.observe(7)
    metrics.refusals.labels("m", "deadline").inc()
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    request = families["grc_request_duration_seconds"]
    assert request.type == "histogram"
    buckets = {s.labels["le"]: s.value for s in request.samples if s.name.endswith("_bucket")}
    assert len(buckets) == len(SECONDS) + 1
    assert (buckets["0.0025"], buckets["0.005"], buckets["+Inf"]) == (0, 1, 1)
    assert [s.value for s in request.samples if s.name.endswith("_sum")] == [0.003]
    stage = families["grc_stage_duration_seconds"]
    counts = {s.labels["stage"]: s.value for s in stage.samples if s.name.endswith("_count")}
    assert counts == {"preprocess": 0, "queue": 1, "compute": 0, "postprocess": 0}
    rows = {s.labels["le"]: s.value for s in families["grc_batch_rows"].samples if s.name.endswith("_bucket")}
    assert len(rows) == len(COUNTS) + 1 and (rows["4.0"], rows["8.0"]) == (0, 1)
    assert families["grc_refusals"].samples[0].value == 1


@pytest.mark.parametrize(("refused", "counted"), [((), (5, 1)), ((0,), (3, 1)), ((0, 1), (0, 0))])
def test_rows_of_refused_requests_are_not_counted(refused: tuple[int, ...], counted: tuple[int, int]) -> None:
    version = SimpleNamespace(name="m", statistics=Statistics())
    batch: Any = [
        SimpleNamespace(version=version, rows=rows, call=None, started=1.0, ended=2.0, answer=[]) for rows in (2, 3)
    ]
    for index in refused:
        batch[index].answer = InputError("id 80")
    service: Any = SimpleNamespace(metrics=Metrics())
    Service.computed(service, batch)
    assert (version.statistics.rows, version.statistics.batches) == counted
    assert service.metrics.of("m").rows.total == counted[0]
    assert service.metrics.of("m").merged.total == (2 - len(refused))
