"""Print the tables of docs/redteam.md from the committed runs.

python benchmarks/redteam_tables.py benchmarks/results/experiments/redteam-bfloat16 [SECTION …]
"""

import sys
from pathlib import Path

from assay.research.redteam import _tables as tables
from assay.research.redteam._field import PRESETS
from assay.research.runs import read_run

SECTIONS = ("paying", "attacks", "claims", "audits", "search", "experts")


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def paying(cells):
    columns = ("model", "dtype", "preset", "attack of the least error", "cost", "ε", "over honest", "checked")
    best = [tables.paying(cells, model, dtype, preset) for model, dtype in tables.fields(cells) for preset in PRESETS]
    rows = [
        (b["model"], b["dtype"], b["preset"], b["attack"], f"{b['cost']:.2f}", f"{b['error']:.3f}",
         f"{b['over_honest']:.1f}", b["checked_99"] or "never")
        for b in best
    ]  # fmt: skip
    print(markdown(columns, rows), "\n")


def show(cells, section):
    if section == "paying":
        paying(cells)
    for model, dtype in tables.fields(cells):
        if section == "attacks":
            for preset in PRESETS:
                rows = tables.attack_rows(cells, model, dtype, preset)
                print(f"{model}, {dtype}, {preset}\n\n{markdown(tables.ATTACK_COLUMNS, rows)}\n")
        elif section == "claims":
            print(f"{model}\n\n{markdown(tables.CLAIM_COLUMNS, tables.claim_rows(cells, model, dtype))}\n")
        elif section == "audits":
            print(f"{model}\n\n{markdown(tables.AUDIT_COLUMNS, tables.audit_rows(cells, model, dtype))}\n")
        elif section == "search":
            honest = tables.honest_errors(cells, model, dtype)["hardened"]
            rows = tables.search_rows(cells, model, honest)
            print(f"{model}\n\n{markdown(tables.SEARCH_COLUMNS, rows)}\n")
    if section == "experts":
        found = [row for cell in cells if cell["kind"] == "experts" for row in cell["rows"]]
        rows = [(r["name"], f"{r['cost']:.2f}", f"{r['artifact']:.3f}", f"{r['hardened']:.3f}") for r in found]
        print(markdown(("prover", "cost", "ε, last state", "ε, hardened"), rows))


def main():
    cells = read_run(Path(sys.argv[1]), "redteam").cells
    for section in sys.argv[2:] or SECTIONS:
        show(cells, section)


if __name__ == "__main__":
    main()
