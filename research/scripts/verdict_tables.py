"""Print tables of docs/statistics.md on one nonce, on laws of one block and on whole lives, from committed results."""

import itertools
from typing import Any

from tables import RESULTS, print_table

from assay.files.jsonl import read_json

COMPOSITE = {"h200": "H200", "cpu": "CPU", "fresh": "CPU, fresh"}
"""Residuals that a composite null hypothesis was judged on, by part of the name of the result."""


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


def without_largest() -> None:
    """Print what leaving the largest residual out gains and costs on the residuals of a GPU: worst of both laws."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in read_json(RESULTS / "one_nonce_h200.json")["rows"]:
        if "random" in row["model"]:  # the page says in words what they show
            continue
        found.setdefault((row["model"], row["preset"], row["dtype"]), []).append(row)
    rows = []
    for (model, preset, dtype), each in found.items():
        before, after = ([row["candidates"][name] for row in each] for name in ("none", "F"))
        shares = [
            " / ".join(f"{100 * max(one[name] for one in ones):.{digits}f}" for ones in (before, after))
            for name, digits in (("accused", 3), ("accused_worst_pair", 2), ("lives_convicted", 1))
        ]
        heavy = [one["with_heavy_worst_pair"] for one in after if one["with_heavy_worst_pair"] is not None]
        cheats = [
            100 * (theirs[2] - ours[2])
            for one, other in zip(before, after, strict=True)
            for theirs, ours in zip(one["cheats"], other["cheats"], strict=True)
        ]
        name = {"reference:qwen3": "Qwen3", "reference:llama": "Llama"}[model]
        put_in = f"{100 * max(heavy):.2f}" if heavy else ""
        heaviest = f"{max(row['heaviest'][0] for row in each):.0f}"
        rows.append((f"{name}, `{preset}`, {dtype}", heaviest, *shares[:2], put_in, f"{max(cheats):.2f}", shares[2]))
    header = ("model, preset, format", "heaviest nonce", "accused, %", "worst pair, %", "with a heavy nonce, %")
    print_table((*header, "fewer cheats, points", "lives convicted, %"), rows)


def wider_laws() -> None:
    """Print what three wider laws of one block accuse and lose, and what laws of four blocks accuse: worst rows."""
    rows = []
    for (where, name), family in itertools.product((("h200", "H200"), ("cpu", "CPU")), ("vectors", "distances")):
        one, four = (
            [row for row in read_json(RESULTS / f"{kind}_{where}.json")["rows"] if _family(row) == family]
            for kind in ("one_block_wider", "four_block_laws")
        )
        for size, (blocks, each) in itertools.product((256, 1024), (("one block", one), ("four blocks", four))):
            found = [row["candidates"]["now"] for row in each if row["law_from"] == size]
            rows.append((family, name, f"now, {size} nonces of {blocks}", *_worst(found), "", ""))
        before = [row["candidates"]["now"]["cheats"] for row in one]
        for candidate in ("A", "B", "C"):
            found = [row["candidates"][candidate] for row in one]
            rows.append((family, name, candidate, *_worst(found), *_lost(before, [row["cheats"] for row in found])))
    header = ("residuals", "of", "law", "accused, %", "worst pair, %", "rows above 1 %", "lives convicted, %")
    print_table((*header, "fewer cheats, points", "from .99 to below"), rows)


def composite() -> None:
    """Print what the likeliest law that the nonces of a block allow accuses and loses: worst rows, by size of law."""
    rows = []
    for (where, name), family in itertools.product(COMPOSITE.items(), ("vectors", "distances")):
        measured = read_json(RESULTS / f"one_block_composite_{where}.json")["rows"]
        by_size = [
            [row["candidates"] for row in measured if _family(row) == family and row["law_from"] == size]
            for size in (256, 1024)
        ]
        for candidate in by_size[0][0]:
            cells = []
            for each in by_size:
                before, found = ([row[one] for row in each] for one in ("none", candidate))
                # The last two cheats have no condition.
                lost = _lost(*([one["cheats"][:4] for one in ones] for ones in (before, found)))
                cells.append((*_worst(found), *(lost if candidate != "none" else ("", ""))))
            name_of = "now" if candidate == "none" else candidate
            rows.append((family, name, name_of, *(" / ".join(pair).strip(" /") for pair in zip(*cells, strict=True))))
    header = ("residuals", "of", "null", "accused, %", "worst pair, %", "rows above 1 %", "lives convicted, %")
    print_table((*header, "fewer cheats, points", "from .99 to below"), rows)


def _family(row: dict[str, Any]) -> str:
    return "distances" if row["preset"] == "poc-2.0" else "vectors"


def _worst(found: list[dict[str, Any]]) -> tuple[str, ...]:
    pairs = [one["accused_worst_pair"] for one in found]
    above = f"{sum(pair > 0.01 for pair in pairs)} of {len(pairs)}"
    accused, lives = (max(one[name] for one in found) for name in ("accused", "lives_convicted"))
    return f"{100 * accused:.3f}", f"{100 * max(pairs):.2f}", above, f"{100 * lives:.1f}"


def _lost(before: list[list[Any]], after: list[list[Any]]) -> tuple[str, str]:
    cells = [
        (theirs[2], ours[2])
        for one, other in zip(before, after, strict=True)
        for theirs, ours in zip(one, other, strict=True)
    ]
    fell = sum(then >= 0.99 > now for then, now in cells)
    return f"{100 * max(then - now for then, now in cells):.1f}", f"{fell} of {len(cells)}"


def life_places() -> None:
    """Print the honest lives that are convicted in a year in which every audit tests the place first."""
    rows = []
    for row in read_json(RESULTS / "life_places.json")["rows"]:
        low, high = row["interval"]
        aside = f"{row['set_aside'] / row['tests']:.1%}"
        convicted = f"{row['convicted']} of {row['nodes']}"
        rows.append((row["dtype"], f"`{row['preset']}`", aside, convicted, f"{low:.5f} to {high:.5f}"))
    print_table(("format", "preset", "audits with places set aside", "convicted", "share, 95 % interval"), rows)
