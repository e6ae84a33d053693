"""Prometheus metrics that every server of assay has, in base units. Each application has a registry of its own."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from assay._version import __version__
from assay.files.jsonl import JsonObject

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of Prometheus' exposition format."""
CONNECTION_BOUNDS = ("total", "client")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Exported:
    """Figures under one prefix, with those of the process and the version.

    Args:
        namespace: Prefix of the names.
    """

    def __init__(self, namespace: str) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.registry = registry
        self.counter = partial(Counter, namespace=namespace, registry=registry)
        self.gauge = partial(Gauge, namespace=namespace, registry=registry)
        self.histogram = partial(Histogram, namespace=namespace, registry=registry, buckets=_SECONDS)
        self.gauge("build_info", "Version.", ["version"]).labels(__version__).set(1)
        self.connections_refused = self.counter(
            "connections_refused", "Connections refused, by the bound that they passed.", ["bound"]
        )
        for bound in CONNECTION_BOUNDS:
            self.connections_refused.labels(bound)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)

    def show(self, snapshot: JsonObject) -> None:
        """Set the gauges from a snapshot."""
