"""Prometheus metrics that every server of assay has, in base units. Each application has a registry of its own."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from assay._version import __version__
from assay.files.jsonl import JsonObject

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of Prometheus' exposition format."""
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
        self._namespace = namespace
        self.gauge = partial(Gauge, namespace=namespace, registry=registry)
        self.histogram = partial(Histogram, namespace=namespace, registry=registry, buckets=_SECONDS)
        self.gauge("build_info", "Version.", ["version"]).labels(__version__).set(1)
        self.connections_refused = self.counter(
            "connections_refused", "Requests refused, by the bound that they passed.", {"bound": ("client",)}
        )

    def counter(self, name: str, help: str, labels: Mapping[str, Sequence[str]] | None = None) -> Counter:
        """Return a counter whose series begin at 0: Prometheus sees no increase in a series that appears.

        Args:
            name: Name after the prefix.
            help: What it counts.
            labels: Labels with the values that they are known to have.
        """
        made = Counter(name, help, list(labels or ()), namespace=self._namespace, registry=self.registry)
        for values in product(*labels.values()) if labels else ():
            made.labels(*values)
        return made

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)

    def show(self, snapshot: JsonObject) -> None:
        """Set the gauges from a snapshot."""
