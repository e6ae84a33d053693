"""The table of the third experiment for docs/vhack-results.md; cog runs it."""

from collections.abc import Mapping
from typing import Any

from tables import RESULTS, print_table

from assay.files.jsonl import read_json

_WORDS = {
    "d_h": "d_h",
    "d_s": "d_s",
    "e_small": "effect at 7 M",
    "e_large": "effect in the larger",
    "lost": "lost",
}


def _interval(mean: Mapping[str, Any]) -> str:
    ends = "" if mean["low"] is None else f" ({mean['low']:.3f} to {mean['high']:.3f})"
    return f"{mean['value']:.3f}{ends}".replace("-", "−")


def claims() -> None:
    """Print the five claims of the plan, their verdicts and the 99 % intervals."""
    rows = []
    for number, claim in enumerate(read_json(RESULTS / "vhack_study3.json")["claims"], 1):
        measured = ", ".join(f"{_WORDS[name]} {_interval(mean)}" for name, mean in claim["measured"].items())
        rows.append((number, claim["says"], f"**{claim['verdict']}**", claim["why"], measured))
    print_table(("", "claim", "verdict", "rests on", "99 % intervals"), rows)
