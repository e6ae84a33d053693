"""Print the tables of docs/networks.md, made from committed results."""

from collections.abc import Iterable
from typing import Any

from assay_research.clusters.clusters import HONEST
from assay_research.clusters.page import model_table
from tables import RESULTS, print_table

from assay.files.jsonl import read_json


def _clusters() -> dict[str, Any]:
    return read_json(RESULTS / "clusters.json")


def _short(name: str) -> str:
    """Return the name of a build as the text calls it."""
    return name.replace("qwen3-235b-a22b-instruct-2507-fp8", "qwen3-235b").replace("minimax-m2.7-awq-4bit", "AWQ")


def _rows(sort: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for build in _clusters()["builds"]:
        for row in build["rows"]:
            if row["sort"] == sort:
                yield _short(build["build"]), row


def sets() -> None:
    """Print the published sets by model, their copies and their faults."""
    columns, rows = model_table(_clusters())
    print_table(columns, [(_short(str(row[0])), *row[1:]) for row in rows])


def faults() -> None:
    """Print the bad places that pairs show, by model and pattern, and what audits of 300 nonces say."""
    rows = []
    for model in _clusters()["models"]:
        for pattern in dict.fromkeys(pair["pattern"] for pair in model["faulty_pairs"]):
            pairs = [pair for pair in model["faulty_pairs"] if pair["pattern"] == pattern]
            audits = [sum(pair["audits"].get(word, 0) for pair in pairs) for word in ("faulty", "fraud")]
            total = sum(sum(pair["audits"].values()) for pair in pairs)
            ratios = [pair["ratio"] for pair in pairs]
            outcomes = ", ".join(sorted({pair["outcome"] for pair in pairs}))
            rows.append((
                _short(model["model"]), pattern, len(pairs), f"{pairs[0]['share']:.0%}",
                f"{min(ratios):.1f} to {max(ratios):.1f}", outcomes, f"{audits[0]} of {total}", audits[1],
            ))  # fmt: skip
    header = ("model", "bad places", "pairs", "share", "times the others", "all nonces", "300: faulty", "300: fraud")
    print_table(header, rows)


def honest() -> None:
    """Print how often each rule accuses honest machines that are left out."""
    rows = [
        (name, row["rule"], row["audits"], f"{100 * row['accused']:.3f}",
         f"{100 * row['low']:.3f} to {100 * row['high']:.3f}", f"{100 * row['worst']:.2f}")
        for name, row in _rows(HONEST)
    ]  # fmt: skip
    print_table(("build", "rule", "audits", "accused, %", "95 %", "worst pair, %"), rows)
