"""Prometheus metrics of every server, in base units. Each application has its registry."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from assay._version import __version__
from assay.files.jsonl import JsonObject

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of Prometheus' exposition format."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Gauged(NamedTuple):
    """A gauge of snapshots; with a label, ``read`` returns a value for each of its values."""

    name: str
    help: str
    read: Callable[[JsonObject], Any]
    label: str = ""


class Exported:
    """Figures under a prefix, with those of requests, of the process and the version.

    Gauges are also made for what is ``shown`` of snapshots.

    Labels never hold keys, hashes, addresses or URLs.
    """

    def __init__(self, namespace: str, shown: Sequence[Gauged] = ()) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._namespace = namespace
        self.gauge = partial(Gauge, namespace=namespace, registry=self.registry)
        self.histogram = partial(
            Histogram, namespace=namespace, registry=self.registry, buckets=_SECONDS
        )
        self._shown = [
            (self.gauge(row.name, row.help, [row.label] if row.label else []), row) for row in shown
        ]
        self.gauge("build_info", "Version.", ["version"]).labels(__version__).set(1)
        self.requests = self.counter(
            "http_requests", "Requests by route and status.", {"route": (), "status": ()}
        )
        self.request_seconds = self.histogram(
            "http_request_seconds", "Time of one request.", ["route"]
        )

    def counter(
        self, name: str, help: str, labels: Mapping[str, Sequence[str]] | None = None
    ) -> Counter:
        """Return a counter whose series start at 0, so that Prometheus sees the first increase.

        ``labels`` has the values that each label is known to have.
        """
        metric = Counter(
            name, help, list(labels or ()), namespace=self._namespace, registry=self.registry
        )
        for combination in product(*labels.values()) if labels else ():
            metric.labels(*combination)
        return metric

    def text(self, snapshot: JsonObject) -> bytes:
        """Return the exposition format with the gauges of a snapshot; None is shown as NaN."""
        for gauge, row in self._shown if snapshot else ():
            reading = row.read(snapshot)
            for value, number in reading.items() if row.label else [("", reading)]:
                (gauge.labels(value) if row.label else gauge).set(
                    math.nan if number is None else number
                )
        return generate_latest(self.registry)
