"""The answer to GET /metrics: what METRICS lists, as Prometheus or OpenMetrics text; and its page.

Rules: core. Whoever scrapes pulls: nothing is counted here, and no part of the node knows of metrics. Escaping, number
formats and the rules of both formats are prometheus_client's. A metric of which nothing is known does not appear.
Source: prometheus/OpenMetrics, specification 1.0; Prometheus, "Exposition formats".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from model.histogram import Distribution
from node.front import Measured
from node.metric import Metric, Told
from node.metrics_network import NETWORK, NODE, TRAININGS
from node.metrics_serving import CACHES, ENGINES, REQUESTS

METRICS: tuple[Metric, ...] = (*REQUESTS, *ENGINES, *CACHES, *NETWORK, *TRAININGS, *NODE)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OPENMETRICS = "application/openmetrics-text"
_END = "# EOF\n"
_PAGE_HEAD = """# Metrics

`GET /metrics` is Prometheus text, and OpenMetrics 1.0 for who accepts `application/openmetrics-text`. This page is made
from the code: `python -c "from node.metrics import page; print(page(), end='')" > docs/METRICS.md`.

* All counts are since the node's start. A metric of which nothing is known does not appear: no engine's without a model
  in this process, no training's without a run.
* Names that vLLM V1 has keep its suffix after `openagi_`, so its dashboards need another prefix. Its `model_name` is
  `model` here, with `revision`: of a run of training the run, for each round would be a series of its own.
* A label holds words of the code, names of models that are served, drops' reasons and, of 32 peers at most, ids.
  Nothing that a client sends becomes one: no prompt, key or address.
* `docs/grafana/openagi.json` is a dashboard of these, `docs/grafana/prometheus.yml` an example of how to scrape them,
  with a key where the node wants one. `GET /api/v1/metrics/model` tells the table of models as JSON, with percentiles.

| metric | type | unit | labels | what | counted by |
| --- | --- | --- | --- | --- | --- |
"""


class _One(Collector):
    """One family, to be written."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Family]:
        yield self._family


def pieces(status: Mapping[str, Any], measured: Measured, *, is_open: bool) -> Iterator[str]:
    """All metrics in Prometheus' own format, or (is_open) as OpenMetrics 1.0, one at a time: together they may take
    tens of milliseconds, for so many models."""
    told = Told(status, measured)
    for metric in METRICS:
        samples = list(metric.read(told))
        if not samples:
            continue
        one = _One(_family(metric, samples))
        if is_open:
            written: bytes = generate_openmetrics(one)  # type: ignore[no-untyped-call]  # theirs
            yield written.decode().removesuffix(_END)
        else:
            yield generate_latest(one).decode()
    if is_open:
        yield _END


def prometheus_text(status: Mapping[str, Any], measured: Measured | None = None) -> str:
    """All metrics in Prometheus' own format."""
    return "".join(pieces(status, measured or Measured(), is_open=False))


def openmetrics_text(status: Mapping[str, Any], measured: Measured | None = None) -> str:
    """The same as OpenMetrics 1.0."""
    return "".join(pieces(status, measured or Measured(), is_open=True))


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics, which then is the answer: Prometheus asks for it first."""
    named = (each.split(";") for each in accept.lower().split(","))
    return any(kind.strip() == OPENMETRICS and "q=0" not in [each.strip() for each in rest] for kind, *rest in named)


def page() -> str:
    """docs/METRICS.md."""
    rows = (
        f"| `{metric.name}` | {metric.type} | {metric.unit} | {', '.join(f'`{label}`' for label in metric.labels)} "
        f"| {metric.help} | {metric.source} |\n"
        for metric in METRICS
    )
    return _PAGE_HEAD + "".join(rows)


def _family(metric: Metric, samples: list[Any]) -> Family:
    family: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
    match metric.type:
        case "counter":
            family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        case "gauge":
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        case "histogram":
            family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        if isinstance(value, Distribution):
            assert isinstance(family, HistogramMetricFamily)
            bounds = [*map(str, value.bounds), "+Inf"]
            family.add_metric(labels, list(zip(bounds, value.cumulative(), strict=True)), value.sum)
        else:
            assert not isinstance(family, HistogramMetricFamily)
            family.add_metric(labels, value)
    return family
