"""Print the tables of docs/networks.md, made from committed results."""

from collections.abc import Iterable
from typing import Any

from assay_research.clusters.clusters import HONEST, REAL, SIMULATED
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


def _cheats(sort: str) -> None:
    """Print how each rule catches cheats: nonces for half and for 99 % of them, those within 60, and called honest."""
    rows = [
        (name, _short(row["cheat"]), row["rule"], row["median"] or "never", row["most"] or "never",
         f"{100 * row['soon']:.1f}", f"{100 * row['accused']:.1f}",
         f"{100 * row['honest']['64']:.1f} / {100 * row['honest']['300']:.1f}")
        for name, row in _rows(sort)
        if sort == REAL or row["rule"] in ("ours", "first version", "count (0.41, 0.1, 0.05)", "oracle")
    ]  # fmt: skip
    header = ("build", "cheat", "rule", "half by", "99 % by", "within 60, %", "within 300, %", "honest at 64 / 300, %")
    print_table(header, rows)


def real() -> None:
    """Print how each rule catches other builds that were passed off as this one."""
    _cheats(REAL)


def simulated() -> None:
    """Print how each rule catches simulated cheats."""
    _cheats(SIMULATED)


def gap() -> None:
    """Print the share of simulated cheats caught within 60 nonces by rules between ours and the oracle."""
    measured = read_json(RESULTS / "clusters_gap.json")
    rules = ("ours", "ours, without spread", "pair known", "cheat known", "both laws known", "oracle",
             "half of the weight on the effect", "multiples a factor of 1.41 apart")  # fmt: skip
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in measured["rows"]:
        if row["cheat"].endswith("× 1.4") or row["cheat"] == "a share × 2":
            key = _short(row["build"]), _short(row["cheat"])
            found.setdefault(key, {})[row["rule"]] = f"{100 * row['accused'][0]:.1f}"
    rows = [(*key, *(row[rule] for rule in rules)) for key, row in found.items()]
    print_table(("build", "cheat", *rules), rows)


def bound() -> None:
    """Print what the most powerful tests of 60 nonces catch of each cheat, beside our rule and the oracle."""
    measured = read_json(RESULTS / "clusters_bound.json")
    tests = ("pair known", "machine unknown", "cheat known", "extreme machines")
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in measured["rows"]:
        key = _short(row["build"]), _short(row["cheat"]).removeprefix("real: ")
        found.setdefault(key, {})[row["rule"], row["laws"]] = row
    rows = []
    for key, of in found.items():
        kinds = [kind for kind in ("histogram", "fitted") if ("pair known", kind) in of]
        each = [[of[name, ""]] for name in ("ours", "oracle")] + [[of[name, kind] for kind in kinds] for name in tests]
        within = [" / ".join(f"{100 * row['caught'][row['nonces'].index(60)]:.1f}" for row in same) for same in each]
        rows.append((*key, *within))
    print_table(("build", "cheat", "ours", "oracle", *tests), rows)


def bound_nonces() -> None:
    """Print after how many nonces 99 % of the cheats in all nonces are caught, at best and by our rule."""
    measured = read_json(RESULTS / "clusters_bound.json")
    tests = ("ours", "oracle", "pair known", "machine unknown", "cheat known", "extreme machines")
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in measured["rows"]:
        if row["cheat"].endswith("× 1.4"):
            pairs = zip(row["nonces"], row["caught"], strict=True)
            first = next((f"{count}" for count, caught in pairs if caught >= 0.99), f"over {row['nonces'][-1]}")
            key = _short(row["build"]), _short(row["cheat"])
            found.setdefault(key, {}).setdefault(row["rule"], []).append(first)
    rows = [(*key, *(" / ".join(of[test]) for test in tests)) for key, of in found.items()]
    print_table(("build", "cheat", *tests), rows)
