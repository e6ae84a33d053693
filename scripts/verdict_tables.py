"""Print tables of docs/statistics.md on what one nonce may say and on whole lives, made from committed results."""

from typing import Any

from tables import RESULTS, print_table

from assay.reports import read_json


def one_nonce() -> None:
    """Print what each bound on one nonce costs and gains: the worst row for each, and invented values caught."""
    measured = read_json(RESULTS / "one_nonce.json")
    rows = []
    for candidate in measured["rows"][0]["candidates"]:
        found: list[dict[str, Any]] = [row["candidates"][candidate] for row in measured["rows"]]
        without = [row["candidates"]["none"] for row in measured["rows"]]
        fewer = max(
            before[2] - after[2]
            for ours, theirs in zip(found, without, strict=True)
            for after, before in zip(ours["cheats"], theirs["cheats"], strict=True)
        )
        pairs = [100 * max(row[name] for row in found) for name in ("accused_worst_pair", "with_heavy_worst_pair")]
        invented = [f"{row[candidate]:.3f}" for row in measured["invented"]]
        rows.append((candidate, f"{100 * max(row['accused'] for row in found):.3f}", *(f"{x:.2f}" for x in pairs),
                     f"{100 * fewer:.1f}", *invented))  # fmt: skip
    laws = [row["law"] for row in measured["invented"]]
    header = ("candidate", "accused, %", "worst pair, %", "with a heavy nonce, %", "fewer cheats, points", *laws)
    print_table(header, rows)


def life_places() -> None:
    """Print the honest lives that are convicted in a year in which every audit tests the place first."""
    rows = []
    for row in read_json(RESULTS / "life_places.json")["rows"]:
        low, high = row["interval"]
        aside = f"{row['set_aside'] / row['tests']:.1%}"
        convicted = f"{row['convicted']} of {row['nodes']}"
        rows.append((row["dtype"], f"`{row['preset']}`", aside, convicted, f"{low:.5f} to {high:.5f}"))
    print_table(("format", "preset", "audits with places set aside", "convicted", "share, 95 % interval"), rows)
