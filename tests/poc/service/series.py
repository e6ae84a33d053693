"""Which series of a query a service does not export."""

import re
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

SELECTOR = re.compile(r"\b((?:assay|process)_\w+)(?:\{([^}]*)\})?")
OF_THE_SCRAPE = {"instance", "job"}
"""Labels that Prometheus adds."""


def absent_series(exported: str, expressions: Iterable[str]) -> list[str]:
    """Return the selectors of expressions that match no sample of an exposition."""
    samples = [
        sample for family in text_string_to_metric_families(exported) for sample in family.samples
    ]
    absent = []
    for name, labels in {
        found for expression in expressions for found in SELECTOR.findall(expression)
    }:
        wanted = [
            part
            for part in re.findall(r'(\w+)(!?=~?)"([^"]*)"', labels)
            if part[0] not in OF_THE_SCRAPE
        ]
        if not any(sample.name == name and _matches(sample.labels, wanted) for sample in samples):
            absent.append(f"{name}{{{labels}}}")
    return absent


def _matches(labels: dict[str, str], wanted: list[tuple[str, str, str]]) -> bool:
    for name, sign, value in wanted:
        has = labels.get(name, "")
        equal = re.fullmatch(value, has) is not None if sign.endswith("~") else has == value
        if equal == sign.startswith("!"):
            return False
    return True
