"""Print the tables of docs/redteam.md from the committed runs.

python benchmarks/redteam_tables.py benchmarks/results/experiments/redteam-bfloat16 [SECTION …]
"""

import sys
from pathlib import Path

from assay.research.redteam import PRESETS
from assay.research.redteam import _tables as tables
from assay.research.runs import read_run

SECTIONS = ("paying", "attacks", "claims", "audits", "search", "experts")


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def show(cells, section):
    if section == "paying":
        print(markdown(*tables.paying_table(cells)), "\n")
    if section == "experts":
        print(markdown(*tables.expert_table(cells)))
    for model, dtype in tables.fields(cells):
        if section == "attacks":
            for preset in PRESETS:
                table = tables.attack_table(cells, model, dtype, preset)
                print(f"{model}, {dtype}, {preset}\n\n{markdown(*table)}\n")
        elif section == "claims":
            print(f"{model}\n\n{markdown(*tables.claim_table(cells, model, dtype))}\n")
        elif section == "audits":
            print(f"{model}\n\n{markdown(*tables.audit_table(cells, model, dtype))}\n")
        elif section == "search":
            print(f"{model}, {dtype}\n\n{markdown(*tables.search_table(cells, model, dtype))}\n")


def main():
    cells = read_run(Path(sys.argv[1]), "redteam").cells
    for section in sys.argv[2:] or SECTIONS:
        show(cells, section)


if __name__ == "__main__":
    main()
